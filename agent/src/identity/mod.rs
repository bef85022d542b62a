//! How pods prove who they are: certificates and their renewal, whom to believe.
//!
//! Identity knows the model only. It opens no port and carries no byte of an application: the proxy brings streams and
//! gets peers that are proven. Time is what a [`Clock`] says.

pub mod ca;
mod clock;
mod crl;
#[cfg(fuzzing)]
pub mod fuzzing;
mod key;
mod radar;
mod reason;
mod schedule;
mod store;
mod svid;
#[cfg(test)]
mod testkit;
mod tls;
mod trust;
mod trust_files;
mod view;
mod x509;

pub use crate::model::{SpiffeError, SpiffeId, TrustDomain};
pub use clock::Clock;
pub use crl::CrlMode;
pub use key::KeyError;
pub use radar::{Danger, Kind, Lifetime, Radar, Reading, RenewalLag, Warning};
pub use reason::{HandshakeError, HandshakeReason};
pub use store::{CertificateStore, NotHeld, RenewalResult, StoreSettings};
pub use svid::{Signatory, Svid};
pub use tls::{ClientTls, Expected, MeshTls, NoCertificateYet, Observer, PeerIdentity, ServerTls, Standing};
pub use trust::{DomainRoots, RootSource, Trust, TrustBundle};
pub use trust_files::{TrustFileError, TrustFiles, TrustFilesSettings};
pub use view::{CertificateView, CertificatesView, CrlView, RootView};
pub use x509::X509Error;
