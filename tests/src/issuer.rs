//! An issuer of JSON Web Tokens: keys of every kind, what it publishes of them, and tokens that say whatever a test wants.

use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use aws_lc_rs::hmac;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaEncoding, RsaKeyPair, RsaPublicKeyComponents,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A key of an issuer.
#[derive(Debug)]
pub struct SigningKey {
    id: String,
    pair: Pair,
}

#[derive(Debug)]
enum Pair {
    Rsa(RsaKeyPair),
    P256(EcdsaKeyPair),
    P384(EcdsaKeyPair),
    P521(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

impl SigningKey {
    /// A new key that signs by this algorithm: `RS256`, `PS512`, `ES256`, `ES384`, `ES512`, `EdDSA`; an RSA key by all that are of RSA.
    ///
    /// # Errors
    /// When there is no such algorithm.
    pub fn new(id: &str, algorithm: &str) -> Result<Self> {
        let pair = match algorithm {
            "ES256" => Pair::P256(EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_FIXED_SIGNING)?),
            "ES384" => Pair::P384(EcdsaKeyPair::generate(&signature::ECDSA_P384_SHA384_FIXED_SIGNING)?),
            "ES512" => Pair::P521(EcdsaKeyPair::generate(&signature::ECDSA_P521_SHA512_FIXED_SIGNING)?),
            "EdDSA" => Pair::Ed25519(Ed25519KeyPair::generate()?),
            rsa if rsa_encoding(rsa).is_some() => Pair::Rsa(RsaKeyPair::generate(KeySize::Rsa2048)?),
            other => bail!("{other} is not known here"),
        };
        Ok(Self { id: id.to_owned(), pair })
    }

    /// What tokens name it by.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its public part, as the issuer publishes it.
    pub fn jwk(&self) -> Value {
        let mut jwk = match &self.pair {
            Pair::Rsa(pair) => {
                let RsaPublicKeyComponents { n, e } =
                    RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                json!({ "kty": "RSA", "n": encoded(n), "e": encoded(e) })
            }
            Pair::P256(pair) => point("P-256", pair.public_key().as_ref()),
            Pair::P384(pair) => point("P-384", pair.public_key().as_ref()),
            Pair::P521(pair) => point("P-521", pair.public_key().as_ref()),
            Pair::Ed25519(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": encoded(pair.public_key().as_ref()) })
            }
        };
        jwk["kid"] = self.id.as_str().into();
        jwk["use"] = "sig".into();
        jwk
    }

    /// A token that names the key and says this.
    ///
    /// # Errors
    /// When the key does not sign.
    pub fn token(&self, claims: &Value) -> Result<String> {
        let algorithm = match &self.pair {
            Pair::Rsa(_) => "RS256",
            Pair::P256(_) => "ES256",
            Pair::P384(_) => "ES384",
            Pair::P521(_) => "ES512",
            Pair::Ed25519(_) => "EdDSA",
        };
        let header = json!({ "alg": algorithm, "typ": "JWT", "kid": self.id });
        self.token_of(&header.to_string(), &claims.to_string(), algorithm)
    }

    /// A token of these texts, whatever they are, signed by an algorithm that need not be what they say.
    ///
    /// # Errors
    /// When the key does not sign by it.
    pub fn token_of(&self, header: &str, claims: &str, algorithm: &str) -> Result<String> {
        let signed = format!("{}.{}", encoded(header), encoded(claims));
        let signature = self.sign(signed.as_bytes(), algorithm)?;
        Ok(format!("{signed}.{}", encoded(signature)))
    }

    /// A token that is signed with what everybody may know.
    pub fn token_of_secret(header: &str, claims: &str, secret: &str) -> String {
        let signed = format!("{}.{}", encoded(header), encoded(claims));
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        format!("{signed}.{}", encoded(hmac::sign(&key, signed.as_bytes())))
    }

    fn sign(&self, message: &[u8], algorithm: &str) -> Result<Vec<u8>> {
        let random = SystemRandom::new();
        let failed = |_| anyhow!("{algorithm} does not sign");
        Ok(match &self.pair {
            Pair::Rsa(pair) => {
                let encoding = rsa_encoding(algorithm).context("no algorithm of RSA")?;
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &random, message, &mut signature).map_err(failed)?;
                signature
            }
            Pair::P256(pair) | Pair::P384(pair) | Pair::P521(pair) => {
                pair.sign(&random, message).map_err(failed)?.as_ref().to_vec()
            }
            Pair::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
        })
    }
}

/// What an issuer publishes that has these keys.
pub fn key_set<'k>(keys: impl IntoIterator<Item = &'k SigningKey>) -> String {
    json!({ "keys": keys.into_iter().map(SigningKey::jwk).collect::<Vec<_>>() }).to_string()
}

/// What an HTTPS server with this certificate and this key, both in PEM, takes connections with.
///
/// # Errors
/// When they are none.
pub fn acceptor(certificate: &str, key: &str) -> Result<TlsAcceptor> {
    let certificate =
        CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificate, PrivateKeyDer::from_pem_slice(key.as_bytes())?)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Answers each connection's one request, whose head is given, with these bytes.
///
/// # Errors
/// When nobody can connect any more.
pub async fn publish(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    answer: impl Fn(&str) -> String + Clone + Send + 'static,
) -> Result<()> {
    loop {
        let (socket, _) = listener.accept().await?;
        let (acceptor, answer) = (acceptor.clone(), answer.clone());
        // How a client ends its connection is for the client to tell.
        tokio::spawn(async move {
            let mut client = acceptor.accept(socket).await?;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(client.read_u8().await?);
            }
            client.write_all(answer(&String::from_utf8_lossy(&head)).as_bytes()).await?;
            client.shutdown().await
        });
    }
}

/// An answer of HTTP with these lines in its head, and this body.
pub fn answer(status: &str, headers: &[&str], body: &str) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}

fn rsa_encoding(algorithm: &str) -> Option<&'static dyn RsaEncoding> {
    Some(match algorithm {
        "RS256" => &signature::RSA_PKCS1_SHA256,
        "RS384" => &signature::RSA_PKCS1_SHA384,
        "RS512" => &signature::RSA_PKCS1_SHA512,
        "PS256" => &signature::RSA_PSS_SHA256,
        "PS384" => &signature::RSA_PSS_SHA384,
        "PS512" => &signature::RSA_PSS_SHA512,
        _ => return None,
    })
}

/// An uncompressed point: a byte that says so, and two coordinates.
fn point(curve: &str, public: &[u8]) -> Value {
    let (x, y) = public[1..].split_at(public.len() / 2);
    json!({ "kty": "EC", "crv": curve, "x": encoded(x), "y": encoded(y) })
}

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}
