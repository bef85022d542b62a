//! Connections on which nothing moves: they are watched where a limit is set on that, and then alone.
//!
//! What moves is counted already, by those who move it; here it is looked at now and then.

use std::time::Duration;

/// How often in the limit: a connection may stay for so much longer.
const LOOKS: u32 = 4;

/// Returns once `moved` has said the same for as long as the limit. None: something is under way, however little moves.
pub(super) async fn unmoved<M: PartialEq>(limit: Duration, moved: impl Fn() -> Option<M>) {
    let (mut last, mut same) = (moved(), 0);
    while same < LOOKS {
        tokio::time::sleep(limit / LOOKS).await;
        let now = moved();
        same = if now.is_some() && now == last { same + 1 } else { 0 };
        last = now;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::pin::pin;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_when_nothing_has_moved_for_long_and_nothing_is_under_way() {
        let (moved, limit) = (Cell::new(Some(0)), Duration::from_secs(8));
        let mut unmoved = pin!(unmoved(limit, || moved.get()));
        let mut is_over_after = async |seconds: u64| {
            tokio::time::timeout(Duration::from_secs(seconds), unmoved.as_mut()).await.is_ok()
        };
        for bytes in 1..20 {
            assert!(!is_over_after(7).await);
            moved.set(Some(bytes));
        }
        assert!(!is_over_after(7).await);
        moved.set(None);
        assert!(!is_over_after(3600).await, "a request is under way");
        moved.set(Some(20));
        assert!(!is_over_after(7).await);
        assert!(is_over_after(4).await);
    }
}
