//! `warm`: answers that are there before anybody asks.
//!
//! Each is asked for when the configuration takes effect, from the cache inwards: no client, no credential, no limit of
//! clients and no access line. It is asked for again before it becomes stale, and where it was dropped. What fails is tried
//! again with ever longer pauses, and logged.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use http_body::Body as _;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{fill::Outcome, gate::Gate, kept::Entry, question::Question, stored::Stored, warmed::Warmed};
use crate::{
    message::{CloneService, path::Parameters},
    telemetry::Exchange,
};

/// How many a route may ask for at once.
const AT_ONCE: usize = 4;
/// For how long one of them counts among these. What takes longer goes on without: paths that hang keep no others cold.
const COUNTS: Duration = Duration::from_secs(10);
/// How often it is looked whether an answer is still there: it may have been dropped, or had to give way.
const LOOK: Duration = Duration::from_secs(5);
/// The pause after a failure, which doubles, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The shortest time between two requests for the same, however short it is fresh.
const LEAST: Duration = Duration::from_millis(100);

/// Keeps all that is to be warm so, one future for each, for ever. `parameters` are those of a path.
pub(super) fn keep<S>(
    gate: &Arc<Gate>,
    inner: &S,
    parameters: impl Fn(&str) -> Option<Parameters>,
) -> Vec<BoxFuture<'static, ()>>
where
    S: CloneService + Sync,
{
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let keep = |warmed: &Warmed| Keeper {
        gate: gate.clone(),
        inner: inner.clone(),
        warmed: warmed.clone(),
        parameters: parameters(warmed.path()),
        places: places.clone(),
    };
    gate.config.warm.iter().map(|warmed| keep(warmed).run().boxed()).collect()
}

struct Keeper<S> {
    gate: Arc<Gate>,
    inner: S,
    warmed: Warmed,
    parameters: Option<Parameters>,
    places: Arc<Semaphore>,
}

/// How an answer was found.
enum Found {
    /// It need not be asked for yet.
    There,
    /// It was asked for.
    Fetched,
}

impl<S> Keeper<S>
where
    S: CloneService + Sync,
{
    async fn run(self) {
        let (route, warmed) = (&self.gate.route, &self.warmed);
        let (mut failures, mut lost) = (0_u32, 0_u32);
        loop {
            let wait = match self.look().await {
                Ok((found, wait)) => {
                    if failures > 0 {
                        info!(%route, %warmed, failures, "an answer is warm again");
                    }
                    failures = 0;
                    // What has no room is not asked for again and again.
                    lost = if matches!(found, Found::There) { 0 } else { lost.saturating_add(1) };
                    wait.min(LOOK * 2_u32.pow(lost.saturating_sub(1).min(10))).max(LEAST)
                }
                Err(error) => {
                    let wait = PAUSE.1.min(PAUSE.0 * 2_u32.pow(failures.min(10)));
                    failures = failures.saturating_add(1);
                    warn!(%route, %warmed, error, retry_seconds = wait.as_secs(), "an answer could not be kept warm");
                    wait
                }
            };
            sleep(wait).await;
        }
    }

    /// Sees that the answer is there, and for how long it need not be asked for.
    ///
    /// # Errors
    /// Why it is not.
    async fn look(&self) -> Result<(Found, Duration), &'static str> {
        if let Some(wait) = self.stored().and_then(|stored| self.wait(&stored)) {
            return Ok((Found::There, wait));
        }
        let place = self.places.acquire().await;
        let mut fetch = pin!(self.fetch());
        if let Ok(done) = timeout(COUNTS, &mut fetch).await {
            done?;
        } else {
            drop(place);
            fetch.await?;
        }
        let stored = self.stored().ok_or("it is not kept")?;
        let wait = self.wait(&stored).ok_or("it is stale when it comes")?;
        Ok((Found::Fetched, wait))
    }

    fn stored(&self) -> Option<Arc<Stored>> {
        let question = self.question()?;
        match self.gate.kept.look(question.primary, None, &question.head.headers).1? {
            Entry::Answer(stored) => Some(stored),
            Entry::Varies(_) | Entry::Pass { .. } => None,
        }
    }

    fn question(&self) -> Option<Question> {
        let mut request = self.warmed.request();
        let exchange = Exchange::new(&request);
        exchange.facts().https = self.warmed.https();
        request.extensions_mut().insert(exchange);
        if let Some(parameters) = &self.parameters {
            request.extensions_mut().insert(parameters.clone());
        }
        let Gate { route, config, kept, .. } = &*self.gate;
        Question::new(request.into_parts().0, Bytes::new(), route, config, &kept.purges).ok()
    }

    /// How long until it has to be asked for again: `refresh` before it is stale, or the last tenth of its time. `None`
    /// where that is now.
    fn wait(&self, stored: &Stored) -> Option<Duration> {
        let life = &stored.life;
        let whole = life.left(life.received());
        let own = self.gate.config.refresh.as_ref().map(|soon| soon.get());
        let before = own.unwrap_or(whole / 10).min(whole / 2);
        life.left(std::time::SystemTime::now()).checked_sub(before).filter(|wait| !wait.is_zero())
    }

    /// Asks for it, or waits for whoever does.
    async fn fetch(&self) -> Result<(), &'static str> {
        const FAILED: &str = "the upstream failed";
        let gate = &self.gate;
        let question = self.question().ok_or("it has no key")?;
        let (key, entry) = gate.kept.look(question.primary, None, &question.head.headers);
        let stale = match entry {
            Some(Entry::Answer(stored)) => Some(stored),
            _ => None,
        };
        let joined = gate.join(&self.inner, &question, key, stale).map_err(|_| "its tag is too long")?;
        // None: it has just come.
        let Some((asking, first)) = joined else { return Ok(()) };
        if first {
            gate.metrics.refreshed.inc();
        }
        let held = asking.clone();
        match asking.await {
            Outcome::Coming(coming) => {
                let Some(mut reader) = coming.recording.reader().filter(|_| coming.is_kept) else {
                    return Err(if coming.status.is_success() { "it is not to be kept" } else { FAILED });
                };
                drop(coming);
                let mut frame =
                    async || std::future::poll_fn(|cx| std::pin::Pin::new(&mut reader).poll_frame(cx)).await;
                while let Some(read) = frame().await {
                    read.map_err(|_| "it broke off")?;
                }
                drop(held);
                Ok(())
            }
            Outcome::Renewed(_) | Outcome::Shared(..) => Ok(()),
            Outcome::StaleIfError(..) => Err(FAILED),
            Outcome::Alone(response, why) => {
                let status = response.lock().take().map(|response| response.status());
                Err(if status.is_some_and(|status| status.is_success()) { why } else { FAILED })
            }
            Outcome::Failed { kind, .. } => Err(kind.slug()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use http::Response;
    use tower::service_fn;

    use super::*;
    use crate::{
        layers::cache::{CacheLayer, Config, State},
        message::{Body, BoxError, Request},
        telemetry::Metrics,
    };

    #[tokio::test(start_paused = true)]
    async fn paths_that_hang_keep_no_others_cold() {
        let hanging = (0..AT_ONCE).map(|n| format!("/hangs/{n}"));
        let warm = hanging.chain(["/ok".to_owned()]).map(|path| path.parse().unwrap()).collect();
        let config = Config { warm, ..Config::default() };
        let layer = CacheLayer::new(&config, "route", "api", &State::default(), None, &Metrics::new());
        let asked = Arc::new(AtomicUsize::new(0));
        let upstream = {
            let asked = asked.clone();
            service_fn(move |request: Request| {
                let asked = asked.clone();
                async move {
                    if request.uri().path() != "/ok" {
                        std::future::pending::<()>().await;
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                    let answer = Response::builder().header("cache-control", "max-age=100");
                    Ok::<_, BoxError>(answer.body(Body::from("warm")).unwrap())
                }
            })
        };
        let keepers = join_all(layer.keep_warm(&upstream, |_| None));
        timeout(COUNTS + Duration::from_secs(1), keepers).await.expect_err("they go on for ever");
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }
}
