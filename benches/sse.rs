//! What it costs to look at an event stream while it passes: whether it stands between two events, which heartbeats and
//! error events ask of each frame, and what kind of event has ended, which is asked until the first one with content.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sidegate::sse::{Boundary, Event, Scanner};

/// A frame as an LLM server sends it: one event with one token.
const TOKEN: &str = "data: {\"id\":\"chatcmpl-8a9f\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,\
                     \"model\":\"llama3.2\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\
                     \"finish_reason\":null}]}\n\n";

fn look(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sse");
    group.throughput(Throughput::Bytes(TOKEN.len() as u64));
    group.bench_function("boundary", |bencher| {
        let mut boundary = Boundary::new();
        bencher.iter(|| {
            boundary.pass(black_box(TOKEN.as_bytes()));
            boundary.here()
        });
    });
    group.bench_function("first event", |bencher| {
        bencher.iter(|| Scanner::new().next(&mut black_box(TOKEN.as_bytes())) == Some(Event::Content));
    });
    group.finish();
}

criterion_group!(benches, look);
criterion_main!(benches);
