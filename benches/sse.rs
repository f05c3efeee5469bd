//! What it costs to look at an event stream while it passes: whether it stands between two events, which heartbeats and
//! error events ask of each frame, what kind of event has ended, which is asked until the first one with content, what
//! it says about usage, and whether it is the report that the client shall not get.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use sidegate::sse::{Boundary, Event, Meter, Scanner, UsageFilter};

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
    group.bench_function("usage of an event", |bencher| {
        let mut meter = meter("text/event-stream");
        bencher.iter(|| {
            meter.pass(black_box(TOKEN.as_bytes()));
            meter.content_events()
        });
    });
    group.bench_function("usage filter", |bencher| {
        let mut filter = UsageFilter::new();
        let frame = Bytes::from_static(TOKEN.as_bytes());
        bencher.iter(|| filter.pass(black_box(frame.clone())).count());
    });
    for (name, body) in [("numbers", numbers()), ("text", text())] {
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(format!("usage of a body of {name}"), |bencher| {
            bencher.iter(|| {
                let mut meter = meter("application/json");
                meter.pass(black_box(body.as_bytes()));
                meter.usage().expect("it reports")
            });
        });
    }
    group.finish();
}

fn meter(kind: &'static str) -> Meter {
    Meter::of(&HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))])).expect("it can be read")
}

/// An embedding of 1536 dimensions.
fn numbers() -> String {
    let numbers = (0..1536).map(|number| format!("-0.0{number:06}")).collect::<Vec<_>>().join(",");
    format!(r#"{{"data":[{{"embedding":[{numbers}],"index":0}}],"usage":{{"prompt_tokens":8,"total_tokens":8}}}}"#)
}

/// An answer of 64 KiB, in which there are quotes and line ends.
fn text() -> String {
    let text = r#"She said \"no\" and went on for what seemed hours.\n"#.repeat(1200);
    format!(
        r#"{{"choices":[{{"message":{{"content":"{text}"}}}}],"usage":{{"prompt_tokens":8,"completion_tokens":9}}}}"#
    )
}

criterion_group!(benches, look);
criterion_main!(benches);
