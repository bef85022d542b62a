//! What a BackendTLSPolicy comes to among the ConfigMaps that there are.

use std::sync::Arc;

use super::{Reason, Refusal};
use crate::config::document::{AuthorityRefs, ConfigMap, PolicySpec, Says, TlsValidation};
use crate::config::{FieldPath, Key, Problem};
use crate::model::{Authorities, BackendTls, Name, ObjectRef};

/// How requests are encrypted where the policy has the word, and what is to be said of that.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::config) struct Encryption {
    /// What is done; an error is why no request can be sent.
    pub(in crate::config) tls: Result<Arc<BackendTls>, Name>,
    /// The condition `ResolvedRefs`.
    pub(in crate::config) resolved_refs: Result<(), Refusal>,
    /// The condition `Accepted`, as far as it is for all targets.
    pub(in crate::config) accepted: Result<(), Refusal>,
    /// What is wrong, for the policy's author.
    pub(in crate::config) problems: Vec<Problem>,
}

/// What the policy comes to, if it is one of these.
pub(in crate::config) fn encryption<'a>(
    policy: &Key,
    spec: &PolicySpec,
    config_map: impl Fn(&ObjectRef) -> Option<&'a ConfigMap>,
) -> Option<Encryption> {
    let Says::Tls(validation) = &spec.says else { return None };
    let Some(validation) = validation else {
        let message = "this version cannot be used: until one can, requests to what it is for are answered with an error";
        let problem = (!spec.targets.is_empty()).then(|| Problem::new(FieldPath::default(), message));
        return Some(Encryption {
            tls: Err(format!("{policy} says something that cannot be used").into()),
            resolved_refs: Ok(()),
            accepted: Ok(()),
            problems: problem.into_iter().collect(),
        });
    };
    let TlsValidation { authorities, hostname, alt_names } = validation;
    let encrypted = |authorities| {
        let (hostname, alt_names) = (hostname.clone(), alt_names.clone());
        Ok(Arc::new(BackendTls { authorities, hostname, alt_names }))
    };
    let refs = match authorities {
        AuthorityRefs::System => {
            return Some(Encryption {
                tls: encrypted(Authorities::System),
                resolved_refs: Ok(()),
                accepted: Ok(()),
                problems: Vec::new(),
            });
        }
        AuthorityRefs::Objects(refs) => refs,
    };
    let (mut given, mut problems, mut refusal) = (Vec::new(), Vec::new(), None);
    for (index, reference) in refs.iter().enumerate() {
        match certificates(reference, &config_map) {
            Ok(certificates) => given.extend_from_slice(certificates),
            Err((key, reason, message)) => {
                let field = FieldPath::new(["spec", "validation", "caCertificateRefs"]).index(index).key(key);
                let problem = Problem::new(field, message);
                // A status has room for one.
                refusal.get_or_insert(Refusal { reason, message: problem.to_string() });
                problems.push(problem);
            }
        }
    }
    // Those that can be used are believed: that lets nobody else in than the policy says.
    let (tls, accepted) = match (given.is_empty(), &refusal) {
        (true, Some(Refusal { message, .. })) => {
            let refusal = Refusal { reason: Reason::NoValidCaCertificate, message: message.clone() };
            (Err(format!("{policy}: {message}").into()), Err(refusal))
        }
        _ => (encrypted(Authorities::Given(given)), Ok(())),
    };
    Some(Encryption { tls, resolved_refs: refusal.map_or(Ok(()), Err), accepted, problems })
}

/// The certificates that are referred to, or in which field it is said why there are none.
fn certificates<'a>(
    reference: &Result<ObjectRef, String>,
    config_map: impl Fn(&ObjectRef) -> Option<&'a ConfigMap>,
) -> Result<&'a [Vec<u8>], (&'static str, Reason, String)> {
    let id = match reference {
        Ok(id) => id,
        Err(kind) => {
            let message = format!("expected a ConfigMap (group \"\"), found {kind}");
            return Err(("kind", Reason::InvalidKind, message));
        }
    };
    let invalid = |message| ("name", Reason::InvalidCaCertificateRef, message);
    let Some(found) = config_map(id) else { return Err(invalid(format!("there is no ConfigMap {id}"))) };
    match &found.authorities {
        Ok(certificates) => Ok(certificates),
        Err(why) => Err(invalid(format!("of the ConfigMap {id} nothing can be used: {why}"))),
    }
}
