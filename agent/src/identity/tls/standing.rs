//! Whether a peer that was believed when its connection began still is: connections live longer than certificates.
//!
//! Who is to be left at once and who only gets no new work is said here; what that does to a connection is for its owner.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::CommonState;
use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::identity::reason::{HandshakeError, HandshakeReason, PeerRejected};
use crate::identity::trust::{Chain, Role};
use crate::identity::x509::Facts;
use crate::identity::{Clock, Trust};

/// Wall clocks are set while we sleep, so no sleep is longer.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// Clients look for another connection in the last tenth of a certificate's life: the server has no occasion to send
/// them away, and those that began at the same time do not all come back at the same time.
const EARLY: f64 = 0.1;

/// Sees what changes from before a handshake on, so that nothing is missed that changes in its course.
#[derive(Debug)]
pub struct Observer {
    trust: Arc<Trust>,
    clock: Clock,
    changes: watch::Receiver<()>,
}

/// The certificates of one peer, checked again when they expire and when what we believe changes.
#[derive(Debug)]
pub struct Standing {
    observer: Observer,
    chain: Vec<CertificateDer<'static>>,
    role: Role,
    /// When the first of the chain expires.
    not_after: SystemTime,
    /// When it is to be replaced.
    retires: SystemTime,
}

/// What may change the standing of a peer.
enum Event {
    TrustChanged,
    TimeIsUp,
}

impl Observer {
    pub(super) fn new(trust: Arc<Trust>, clock: Clock) -> Self {
        Self { changes: trust.changes(), trust, clock }
    }

    /// Of the client whose handshake is done.
    pub fn of_client(self, connection: &CommonState) -> Standing {
        Standing::of(self, connection.peer_certificates().unwrap_or_default(), Role::Client)
    }

    /// Of the server whose handshake is done.
    pub fn of_server(self, connection: &CommonState) -> Standing {
        Standing::of(self, connection.peer_certificates().unwrap_or_default(), Role::Server)
    }
}

impl Standing {
    fn of(observer: Observer, chain: &[CertificateDer<'_>], role: Role) -> Self {
        let chain: Vec<_> = chain.iter().map(|der| der.clone().into_owned()).collect();
        let now = observer.clock.now();
        let not_after = chain.iter().filter_map(|der| Some(Facts::read(der).ok()?.not_after)).min();
        // None can be read: no handshake lets that pass.
        let not_after = not_after.unwrap_or(now);
        let left = not_after.duration_since(now).unwrap_or_default();
        let retires = match role {
            Role::Server => not_after - left.mul_f64(EARLY * fastrand::f64()),
            Role::Client => not_after,
        };
        Self { observer, chain, role, not_after, retires }
    }

    /// Returns when nothing may be carried for the peer any more: its certificate was revoked, or its trust domain is not
    /// believed any more. `lapses` is called when it is only too late for new work, at most once: the certificate has expired,
    /// or the root that it leads to is gone, as at the end of a rotation. What was begun before goes on.
    pub async fn withdrawn(mut self, lapses: impl FnOnce(&HandshakeError)) -> HandshakeError {
        let mut lapses = Some(lapses);
        loop {
            let happened = self.something_happens(lapses.is_some()).await;
            let why = match happened {
                Event::TimeIsUp => {
                    HandshakeError::new(HandshakeReason::Expired, "the certificate is at the end of its life")
                }
                Event::TrustChanged => match self.verify() {
                    Ok(()) => continue,
                    Err(rejected) => HandshakeError::of(&rejected.into()),
                },
            };
            if matches!(why.reason, HandshakeReason::Revoked | HandshakeReason::WrongTrustDomain) {
                return why;
            }
            if let Some(lapses) = lapses.take() {
                lapses(&why);
            }
        }
    }

    /// The chain as it is believed now. That it expires is no reason to forget who it was of: a certificate may be revoked
    /// later.
    fn verify(&self) -> Result<(), PeerRejected> {
        let Some((leaf, intermediates)) = self.chain.split_first() else {
            return Ok(());
        };
        let now = self.observer.clock.now().min(self.not_after);
        self.observer.trust.verify(Chain { leaf, intermediates }, self.role, now).map(|_id| ())
    }

    async fn something_happens(&mut self, can_lapse: bool) -> Event {
        loop {
            let Observer { clock, changes, .. } = &mut self.observer;
            let left = match can_lapse {
                true => self.retires.duration_since(clock.now()).unwrap_or_default(),
                false => Duration::MAX,
            };
            if left.is_zero() {
                return Event::TimeIsUp;
            }
            match timeout(left.min(LONGEST_SLEEP), changes.changed()).await {
                Ok(Ok(())) => return Event::TrustChanged,
                // The sender lives as long as the trust that we hold.
                Ok(Err(_)) => std::future::pending().await,
                Err(_elapsed) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use tokio::io::duplex;
    use tokio::time::timeout_at;

    use super::*;
    use crate::identity::crl;
    use crate::identity::testkit::*;
    use crate::identity::trust::RootSource;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A client and a server that have shaken hands at the beginning of time, with certificates for a day.
    struct Met {
        authority: Arc<Authority>,
        web: Node,
        db: Node,
        server: Standing,
        client: Standing,
    }

    async fn meet(during: impl FnOnce(&Node)) -> Met {
        let authority = Authority::new("cluster.local", at(0), 3650 * DAY);
        let clock = tokio_clock();
        let web = Node::with(&authority, &clock, &id("web")).await;
        let db = Node::with(&authority, &clock, &id("db")).await;
        let (near, far) = duplex(64 * 1024);
        let (dials, accepts) =
            (web.tls.client(&id("web"), &id("db").into()).unwrap(), db.tls.server(&id("db")).unwrap());
        let observers = (web.tls.observer(), db.tls.observer());
        let (dialled, accepted) = tokio::join!(dials.connect(near), accepts.accept(far));
        during(&db);
        let server = observers.0.of_server(dialled.unwrap().0.get_ref().1);
        let client = observers.1.of_client(accepted.unwrap().0.get_ref().1);
        Met { authority, web, db, server, client }
    }

    impl Met {
        /// What the client thinks of the server and the server of the client, without the stores that tick for three days.
        fn alone(self) -> (Standing, Standing) {
            (self.server, self.client)
        }
    }

    /// What becomes of a peer within three days, with the hours at which it does.
    async fn check(standing: Standing, expected: Expect) {
        let clock = standing.observer.clock.clone();
        let line = |what: &str, why: &HandshakeError| {
            let hours = clock.now().duration_since(at(0)).unwrap().as_secs_f64() / 3600.0;
            format!("{what} after {hours:.1} h ({}): {}", why.reason.as_str(), why.detail)
        };
        let mut told = Vec::new();
        let lapses = |why: &HandshakeError| told.push(line("lapses", why));
        let end = tokio::time::Instant::now() + 72 * HOUR;
        if let Ok(why) = timeout_at(end, standing.withdrawn(lapses)).await {
            told.push(line("withdrawn", &why));
        }
        expected.assert_eq(&told.join("\n"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_lapses_with_its_certificate_and_not_before() {
        let (_, client) = meet(|_| ()).await.alone();
        check(client, expect!["lapses after 24.0 h (expired): the certificate is at the end of its life"])
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_is_left_a_little_before_and_not_by_all_at_once() {
        let met = meet(|_| ()).await;
        let begun = met.server.not_after - DAY;
        let retires = || {
            let server = Standing::of(met.web.tls.observer(), &met.server.chain, Role::Server);
            server.retires.duration_since(begun).unwrap().as_secs_f64() / 3600.0
        };
        let hours: Vec<_> = (0..100).map(|_| retires()).collect();
        assert!(hours.iter().all(|hours| (21.6..=24.0).contains(hours)), "{hours:?}");
        let (first, last) = hours.iter().fold((f64::MAX, 0.0_f64), |(a, b), h| (a.min(*h), b.max(*h)));
        assert!(last - first > 1.0, "{hours:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_revoked_peer_is_left_at_once_also_when_it_has_lapsed() {
        let met = meet(|_| ()).await;
        let list = |whose: &Standing| {
            let serial = Facts::read(&whose.chain[0]).unwrap().serial;
            crl::parse(met.authority.crl(&[&serial], at(0), at(10 * 86_400)).as_bytes()).unwrap()
        };
        let (without_server, without_client) = (list(&met.server), list(&met.client));
        let trust = [&met.web, &met.db].map(|node| node.trust.clone());
        let (server, client) = met.alone();
        trust[0].set_crls(without_server);
        check(server, expect!["withdrawn after 0.0 h (revoked): invalid peer certificate: Revoked"]).await;

        let later = tokio::spawn(async move {
            tokio::time::sleep(30 * HOUR).await;
            trust[1].set_crls(without_client);
        });
        check(
            client,
            expect![[r#"
                lapses after 24.0 h (expired): the certificate is at the end of its life
                withdrawn after 30.0 h (revoked): invalid peer certificate: Revoked"#]],
        )
        .await;
        later.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_in_the_course_of_a_handshake_is_not_missed() {
        let met = meet(|db| {
            db.trust.set_roots(&domain("cluster.local"), RootSource::Authority, &[]).unwrap();
        })
        .await;
        let (_, client) = met.alone();
        check(
            client,
            expect!["withdrawn after 0.0 h (wrong_trust_domain): spiffe://cluster.local/ns/shop/sa/web is of a trust domain that is neither ours nor federated"],
        )
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_root_that_goes_lets_what_was_begun_come_to_its_end() {
        let met = meet(|_| ()).await;
        let other = Authority::new("cluster.local", at(0), 3650 * DAY);
        let roots = std::slice::from_ref(&other.certificate);
        met.db.trust.set_roots(&domain("cluster.local"), RootSource::Authority, roots).unwrap();
        let (_, client) = met.alone();
        check(
            client,
            expect!["lapses after 0.0 h (unknown_issuer): invalid peer certificate: UnknownIssuer"],
        )
        .await;
    }
}
