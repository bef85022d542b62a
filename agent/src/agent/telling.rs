//! How other agents learn which pods of this node take tunnels: through a folder that they share, or the API server.

use std::time::Duration;

use super::enrolled::{Publisher, takes_plaintext_when_down};
use crate::capture::OnAgentDown;
use crate::config::document::Published;
use crate::discovery::kubernetes::Announcer;
use crate::model::{Workload, WorkloadUid};

/// How long the API server may take to hear of pods that leave. Beyond that their clients find a tunnel that ends.
const HEARS: Duration = Duration::from_secs(3);

/// How long other agents may take to notice that a pod takes no tunnels any more.
const NOTICE: Duration = Duration::from_millis(250);

/// Tells the other agents.
#[derive(Debug)]
pub(super) enum Telling {
    /// By a file.
    Folder(Publisher),
    /// By annotations.
    Api(Announcer, OnAgentDown),
}

impl Telling {
    /// The pod takes tunnels.
    pub(super) fn publish(&mut self, workload: &Workload) {
        match self {
            Self::Folder(publisher) => publisher.publish(workload),
            Self::Api(announcer, on_agent_down) => {
                let plaintext_when_down = takes_plaintext_when_down(workload, *on_agent_down);
                let value = Published { plaintext_when_down };
                announcer.enrolled(&workload.uid, &workload.pod, value.as_str());
            }
        }
    }

    /// Whether it is told of the pod.
    pub(super) fn has(&self, uid: &WorkloadUid) -> bool {
        match self {
            Self::Folder(publisher) => publisher.has(uid),
            Self::Api(announcer, _) => announcer.has(uid),
        }
    }

    /// These take no tunnels any more. What returns when others know, if that is news to them; whoever does not wait for it drops it.
    pub(super) fn withdraw(
        &mut self,
        uids: &[WorkloadUid],
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let (is_news, announcer) = match self {
            Self::Folder(publisher) => (publisher.withdraw(uids), None),
            Self::Api(announcer, _) => (announcer.withdraw(uids), Some(announcer.clone())),
        };
        let uids = uids.to_vec();
        is_news.then_some(async move {
            if let Some(announcer) = announcer {
                announcer.settled(&uids, HEARS).await;
            }
            tokio::time::sleep(NOTICE).await;
        })
    }

    /// What an earlier agent has told of pods that are not to be enrolled now goes.
    pub(super) fn withdraw_all_but(&mut self, is_wanted: impl Fn(&WorkloadUid) -> bool) {
        match self {
            Self::Folder(publisher) => publisher.withdraw_all_but(is_wanted),
            Self::Api(announcer, _) => announcer.withdraw_all_but(is_wanted),
        }
    }

    /// Whether there is nothing to be said again by [`Self::try_again`].
    pub(super) fn is_settled(&self) -> bool {
        match self {
            Self::Folder(publisher) => publisher.is_settled(),
            Self::Api(..) => true,
        }
    }

    /// Says again what could not be said. The API server is told for as long as it takes anyway.
    pub(super) fn try_again(&mut self) {
        if let Self::Folder(publisher) = self {
            publisher.try_again();
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::kubernetes::testkit::FakeApi;
    use crate::model::ObjectRef;

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_does_not_answer_holds_those_alone_who_wait_for_it() {
        let announcer = Announcer::new(FakeApi::new(|_| None).client(), "node-1".into());
        let uids: [WorkloadUid; 1] = ["uid".into()];
        announcer.enrolled(&uids[0], &ObjectRef::new("shop", "web"), "open");
        tokio::spawn(announcer.clone().run());
        let mut telling = Telling::Api(announcer, OnAgentDown::Open);

        let began = Instant::now();
        let known = telling.withdraw(&uids).expect("it is news to others");
        assert!(!telling.has(&uids[0]), "withdrawn though nobody waits");
        assert!(telling.withdraw(&uids).is_none(), "it is no news any more");
        assert_eq!(began.elapsed(), Duration::ZERO);
        known.await;
        assert_eq!(began.elapsed(), HEARS + NOTICE);
    }
}
