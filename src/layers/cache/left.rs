//! Streams that nobody reads, while their upstreams go on: how many of them there may be.
//!
//! Who has left holds no place of a limit any more, and what was begun for it goes on, for as long as `resume` says. So
//! that this gets round no limit, each principal has few of them, each address where there is no principal, and all of a
//! route together take no more than a quarter of what may be asked of the upstream at once. One too many, and the one that
//! was left first is let go, with its upstream's request.

use std::{
    collections::VecDeque,
    num::NonZeroU32,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::request::Parts;
use parking_lot::Mutex;

use super::{recording::Recording, resume::Id};
use crate::{
    message::{Net, Principal},
    telemetry::exchange::client_ip,
};

/// So many of one principal, or of one address: the windows that somebody has open.
const OF_ONE: usize = 8;
/// So many of a route, where nothing says how much may be asked of the upstream at once.
const OF_ALL: usize = 1024;

/// Who began a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    Principal(Arc<str>),
    Net(Net),
    /// A Unix socket, or a proxy that does not say.
    Unknown,
}

impl Owner {
    /// Who sends a request.
    pub(super) fn of(head: &Parts) -> Self {
        match (head.extensions.get::<Principal>(), client_ip(&head.extensions)) {
            (Some(principal), _) => Self::Principal(principal.identity.clone()),
            (None, Some(ip)) => Self::Net(Net::of(ip)),
            (None, None) => Self::Unknown,
        }
    }
}

/// Those of a route, in the order in which they were left.
#[derive(Debug)]
pub(super) struct Left {
    all: Mutex<VecDeque<Entry>>,
    most: AtomicUsize,
}

#[derive(Debug)]
struct Entry {
    id: Id,
    owner: Owner,
    recording: Weak<Recording>,
}

impl Default for Left {
    fn default() -> Self {
        Self { all: Mutex::default(), most: OF_ALL.into() }
    }
}

impl Left {
    /// How much may be asked of the upstream at once, where that has a limit. What is left keeps to it from the next one on.
    pub(super) fn beside(&self, places: Option<NonZeroU32>) {
        let quarter = |places: NonZeroU32| usize::try_from(places.get() / 4).unwrap_or(OF_ALL);
        self.most.store(places.map_or(OF_ALL, quarter).clamp(1, OF_ALL), Ordering::Relaxed);
    }

    /// Notes that a stream was left whose upstream goes on. Which ones have to be let go for it.
    pub(super) fn add(&self, id: Id, owner: &Owner, recording: &Arc<Recording>) -> Vec<Id> {
        // Without the lock: one may be the last of something.
        let mut seen = Vec::new();
        let mut gone = Vec::new();
        let mut all = self.all.lock();
        all.retain(|entry| {
            let recording = entry.recording.upgrade();
            let is_left = entry.id != id && recording.as_ref().is_some_and(|recording| recording.runs_for_nobody());
            seen.extend(recording);
            is_left
        });
        all.push_back(Entry { id, owner: owner.clone(), recording: Arc::downgrade(recording) });
        let is_own = |entry: &Entry| *owner != Owner::Unknown && entry.owner == *owner;
        if all.iter().filter(|entry| is_own(entry)).count() > OF_ONE
            && let Some(first) = all.iter().position(is_own)
        {
            gone.extend(all.remove(first));
        }
        while all.len() > self.most.load(Ordering::Relaxed) {
            gone.extend(all.pop_front());
        }
        drop(all);
        gone.into_iter().map(|entry| entry.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, net::IpAddr, pin::Pin, task, time::Duration};

    use bytes::Bytes;
    use http_body::Frame;
    use http_body_util::BodyExt;
    use tower::{Layer, ServiceExt, service_fn};

    use super::{
        super::{CacheLayer, Config, State},
        *,
    };
    use crate::{
        config::{HumanDuration, Toggle},
        message::{Body, BoxError, Request},
        telemetry::{Exchange, Metrics},
    };

    /// A stream of one event, and then silence.
    struct Silent {
        event: Option<&'static str>,
        _running: Arc<()>,
    }

    impl http_body::Body for Silent {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut task::Context<'_>,
        ) -> task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            match self.event.take() {
                Some(event) => task::Poll::Ready(Some(Ok(Frame::data(event.into())))),
                None => task::Poll::Pending,
            }
        }
    }

    /// How many requests the upstream has when these have come and gone: of each principal, or address, so many. And how
    /// many when `resume` is over.
    async fn left(places: Option<u32>, owners: &[(&str, usize)]) -> [usize; 2] {
        let (state, running) = (State::default(), Arc::new(()));
        let after = HumanDuration::from_secs(30);
        let config = Config { resume: Toggle::On(after), ..Config::default() };
        let layer = CacheLayer::new(&config, "events", "api", &state, None, &Metrics::new());
        let silent = running.clone();
        let service = layer.beside(places.and_then(NonZeroU32::new)).layer(service_fn(move |_: Request| {
            let body = Body::new(Silent { event: Some("data: 1\n\n"), _running: silent.clone() });
            let response = http::Response::builder().header("content-type", "text/event-stream").body(body);
            std::future::ready(Ok::<_, BoxError>(response.unwrap()))
        }));
        let mut path = 0;
        for &(owner, count) in owners {
            for _ in 0..count {
                path += 1;
                let mut request = http::Request::get(format!("/{path}")).body(()).unwrap();
                match owner.parse::<IpAddr>() {
                    Ok(ip) => {
                        let exchange = Exchange::new(&request);
                        exchange.facts().client_ip = Some(ip);
                        request.extensions_mut().insert(exchange);
                    }
                    Err(_) if owner.is_empty() => {}
                    Err(_) => {
                        request.extensions_mut().insert(Principal::new(owner, None));
                    }
                }
                let mut answer = service.clone().oneshot(request.map(|()| Body::empty())).await.unwrap();
                answer.body_mut().frame().await.unwrap().unwrap();
                drop(answer);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let running = || Arc::strong_count(&running) - 2;
        let before = running();
        tokio::time::sleep(after.get()).await;
        [before, running()]
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_leaves_more_upstream_requests_behind_than_a_few() {
        assert_eq!(left(None, &[("one", 30), ("two", 3)]).await, [OF_ONE + 3, 0]);
        assert_eq!(left(None, &[("192.0.2.1", 20), ("192.0.2.2", 20)]).await, [2 * OF_ONE, 0]);
        assert_eq!(left(None, &[("2001:db8::1", 5), ("2001:db8::2", 5)]).await, [OF_ONE, 0], "one network");
        assert_eq!(left(None, &[("", 20)]).await, [20, 0], "whoever they are");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_of_a_route_takes_a_quarter_of_its_places() {
        assert_eq!(left(Some(50), &[("one", 7), ("two", 7), ("three", 7)]).await, [12, 0]);
        assert_eq!(left(Some(1), &[("one", 7)]).await, [1, 0]);
        assert_eq!(left(None, &[("", OF_ALL + 10)]).await, [OF_ALL, 0]);
    }
}
