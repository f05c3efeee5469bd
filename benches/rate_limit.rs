//! What the arithmetic of rate limits costs: one limit and three, with room and without; and the layer around it, which
//! also finds the counters and writes what it says, in memory.

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, criterion_group, criterion_main};
use sidegate::{
    layers::rate_limit::{
        Config, RateLimitLayer, State,
        window::{Algorithm, Demand, Quota, as_micros, take},
    },
    message::{BoxError, Connection, Peer, Request, Response},
    telemetry::Metrics,
};
use tokio::runtime::Builder;
use tower::{ServiceBuilder, ServiceExt, service_fn};

fn demand(algorithm: Algorithm, limit: f64) -> Demand {
    let quota = Quota { algorithm, limit, per: as_micros(Duration::from_secs(3600)), burst: limit };
    Demand { quota, cost: 1.0, shadow: false }
}

fn arithmetic(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rate_limit");
    let (window, bucket) = (Algorithm::SlidingWindow, Algorithm::TokenBucket);
    let cases = [
        ("one window", vec![demand(window, 1e15)]),
        ("three that have room", vec![demand(window, 1e15), demand(window, 1e15), demand(bucket, 1e15)]),
        ("three, one without room", vec![demand(window, 1e15), demand(window, 1.0), demand(bucket, 1e15)]),
    ];
    for (name, demands) in cases {
        let mut counters = vec![None; demands.len()];
        let mut now = 1e15;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                now += 10.0;
                take(black_box(&mut counters), black_box(&demands), now)
            });
        });
    }
    group.finish();
}

fn layer(criterion: &mut Criterion) {
    let runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
    let _entered = runtime.enter();
    let mut group = criterion.benchmark_group("rate_limit layer");
    for (name, limit) in [("three rules", "1000000000/h"), ("refused", "1/h")] {
        let rules = format!(
            r#"[{{"name": "a", "key": "ip", "limit": "{limit}"}}, {{"name": "b", "key": "global", "limit": "1000000000/h"}},
                {{"name": "c", "key": ["route", "ip"], "limit": "1000000000/h", "algorithm": "token_bucket"}}]"#
        );
        let config: Config = serde_json::from_str(&rules).expect("rules");
        let layer = RateLimitLayer::new(&config, "all", &State::default(), None, &Metrics::new());
        let service = ServiceBuilder::new()
            .layer(layer)
            .service(service_fn(|_: Request| async { Ok::<_, BoxError>(Response::default()) }));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let mut request = Request::default();
                request.extensions_mut().insert(Connection::new(Peer::tcp(([192, 0, 2, 1], 1).into()), false));
                runtime.block_on(service.clone().oneshot(request)).is_ok()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, arithmetic, layer);
criterion_main!(benches);
