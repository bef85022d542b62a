//! TLS towards servers that are not of the mesh: whose certificates are believed.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::sentence::in_one_sentence;

/// Certificates that lead to a root in this file are believed; without a file to one of the system, or of Mozilla where the system has
/// none, as in a container image.
pub(crate) fn client(ca: Option<&Path>) -> Result<ClientConfig, String> {
    let roots = match ca {
        Some(path) => Arc::new(of_file(path).map_err(|why| format!("{}: {why}", path.display()))?),
        None => of_system(),
    };
    Ok(builder()?.with_root_certificates(roots).with_no_client_auth())
}

/// No certificate is believed, for none will be seen.
pub(crate) fn client_of_nobody() -> Result<ClientConfig, String> {
    Ok(builder()?.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// The roots of the system as they were when they were first asked for, or of Mozilla where the system has none.
pub(crate) fn of_system() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let read = || {
        let mut roots = RootCertStore::empty();
        // Systems have had some that nobody can use.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        Arc::new(roots)
    };
    ROOTS.get_or_init(read).clone()
}

/// What every client of such servers begins with.
pub(crate) fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| in_one_sentence(&error))
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
