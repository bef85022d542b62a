//! TLS towards servers that are not of the mesh: whose certificates are believed.

use std::path::Path;
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt as _;
use rustls::client::WantsClientCert;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::sentence::in_one_sentence;

/// Certificates that lead to a root in this file are believed; without a file to one of the system, or of Mozilla where the system has
/// none, as in a container image.
pub(crate) fn client(ca: Option<&Path>) -> Result<ClientConfig, String> {
    let config = match ca {
        Some(path) => {
            let roots = of_file(path).map_err(|why| format!("{}: {why}", path.display()))?;
            builder()?.with_root_certificates(roots)
        }
        None => of_system()?,
    };
    Ok(config.with_no_client_auth())
}

/// No certificate is believed, for none will be seen.
pub(crate) fn client_of_nobody() -> Result<ClientConfig, String> {
    Ok(builder()?.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

fn of_system() -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
    match builder()?.with_native_roots() {
        Ok(config) => Ok(config),
        Err(_) => Ok(builder()?.with_webpki_roots()),
    }
}

fn of_file(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let file = CertificateDer::pem_file_iter(path).map_err(|error| in_one_sentence(&error))?;
    for certificate in file {
        let certificate = certificate.map_err(|error| in_one_sentence(&error))?;
        roots.add(certificate).map_err(|error| in_one_sentence(&error))?;
    }
    match roots.is_empty() {
        true => Err("there is no certificate in it".to_owned()),
        false => Ok(roots),
    }
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| in_one_sentence(&error))
}
