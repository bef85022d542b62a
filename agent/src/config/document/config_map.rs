//! ConfigMaps, as far as they hold certificates of authorities (`ca.crt`).

use std::fmt;

use k8s_openapi::api::core::v1 as core;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};

use super::super::Problem;
use super::object_id;
use crate::model::ObjectRef;

/// A ConfigMap.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfigMap {
    /// Namespace and name.
    pub id: ObjectRef,
    /// The authorities' certificates under `ca.crt`, in DER, one at least; else why there are none.
    pub authorities: Result<Vec<Vec<u8>>, String>,
}

impl ConfigMap {
    /// Most ConfigMaps hold other things, so that it is no problem of theirs if they hold no certificates.
    pub(super) fn read(object: &core::ConfigMap) -> Result<Self, Problem> {
        let text = object.data.as_ref().and_then(|data| data.get("ca.crt"));
        let authorities = text.ok_or_else(|| "it has no data under ca.crt".to_owned());
        Ok(Self { id: object_id(&object.metadata)?, authorities: authorities.and_then(|text| read(text)) })
    }

    /// One of which the API server does not tell.
    pub fn untold(id: ObjectRef) -> Self {
        Self { id, authorities: Err("the API server does not tell of it".to_owned()) }
    }
}

/// The text itself is told to nobody: who has put it there may have meant something else.
fn read(text: &str) -> Result<Vec<Vec<u8>>, String> {
    let certificates: Vec<CertificateDer<'_>> = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|_| "what it has under ca.crt is not PEM".to_owned())?;
    if certificates.is_empty() {
        return Err("there is no certificate in what it has under ca.crt".to_owned());
    }
    for (index, certificate) in certificates.iter().enumerate() {
        webpki::anchor_from_trusted_cert(certificate)
            .map_err(|error| format!("certificate {} under its ca.crt cannot be used: {error}", index + 1))?;
    }
    Ok(certificates.iter().map(|certificate| certificate.to_vec()).collect())
}

impl fmt::Debug for ConfigMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authorities = self.authorities.as_ref().map(Vec::len);
        f.debug_struct("ConfigMap").field("id", &self.id).field("authorities", &authorities).finish()
    }
}
