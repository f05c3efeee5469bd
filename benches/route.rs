//! What it costs to find a request's route: with one route, twenty and two hundred, for the route that is
//! looked at last, and for a path that is not plain and so is read in several ways.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use http::Request;
use sidegate::route::{Match, Table};

/// A catch-all after `more` routes, a third of each kind.
fn table(more: usize) -> Table<usize> {
    let matching = |index: usize| match index % 3 {
        _ if index == more => Match::default(),
        0 => Match { path: format!("/v1/service-{index}/status").parse().ok(), ..Match::default() },
        1 => Match { path: format!("/v1/service-{index}/{{id}}").parse().ok(), ..Match::default() },
        _ => Match {
            host: Some("api.example.com".into()),
            path: format!("/v1/service-{index}/*").parse().ok(),
            ..Match::default()
        },
    };
    Table::new((0..=more).map(|index| (matching(index), index)).collect())
}

fn select(criterion: &mut Criterion) {
    let request = |path: &str| {
        let request = Request::builder().method("POST").uri(path).header("host", "api.example.com:8080");
        request.body(()).expect("all parts are valid")
    };
    let mut group = criterion.benchmark_group("route");
    for routes in [1, 20, 200] {
        let table = table(routes - 1);
        let plain = request("/v1/chat/completions");
        group.bench_function(BenchmarkId::new("last", routes), |bencher| {
            bencher.iter(|| black_box(&table).select(black_box(&plain)).is_ok());
        });
        let encoded = request("/v1/files/a%20report.pdf");
        group.bench_function(BenchmarkId::new("encoded", routes), |bencher| {
            bencher.iter(|| black_box(&table).select(black_box(&encoded)).is_ok());
        });
    }
    group.finish();
}

criterion_group!(benches, select);
criterion_main!(benches);
