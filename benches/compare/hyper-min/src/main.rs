//! The smallest sensible reverse proxy on hyper: its server in front of hyper-util's pooled client. No
//! routing, no logs, no metrics: what it costs is the floor for a proxy that is built from these parts.
//!
//! `hyper-min PORT UPSTREAM_PORT` serves HTTP/1.1, and HTTP/2 with prior knowledge, on the loopback address.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderMap, HeaderName, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// Removes what belongs to one hop.
fn strip(headers: &mut HeaderMap) {
    if let Some(named) = headers.remove(CONNECTION) {
        let named = named.to_str().unwrap_or_default().split(',');
        for name in named.filter_map(|name| name.trim().parse::<HeaderName>().ok()) {
            headers.remove(name);
        }
    }
    for name in [TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection"] {
        headers.remove(name);
    }
}

async fn forward(
    client: Client<HttpConnector, Incoming>,
    upstream: Authority,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let target = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    let uri = Uri::builder().scheme(Scheme::HTTP).authority(upstream).path_and_query(target).build();
    *request.uri_mut() = uri.expect("its three parts are there");
    *request.version_mut() = Version::HTTP_11;
    strip(request.headers_mut());
    Ok(match client.request(request).await {
        Ok(mut response) => {
            strip(response.headers_mut());
            response.map(BodyExt::boxed_unsync)
        }
        Err(_) => {
            let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
            *response.status_mut() = StatusCode::BAD_GATEWAY;
            response
        }
    })
}

fn main() -> std::io::Result<()> {
    let mut ports = std::env::args().skip(1).filter_map(|port| port.parse::<u16>().ok());
    let (Some(port), Some(upstream)) = (ports.next(), ports.next()) else {
        return Err(std::io::Error::other("usage: hyper-min PORT UPSTREAM_PORT"));
    };
    let upstream: Authority = format!("127.0.0.1:{upstream}").parse().expect("an address is an authority");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client: Client<_, Incoming> = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .pool_timer(TokioTimer::new())
            .build(connector);
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(([127, 0, 0, 1], port).into())?;
        let listener = socket.listen(4096)?;
        loop {
            let Ok((io, _)) = listener.accept().await else { continue };
            io.set_nodelay(true)?;
            let (client, upstream) = (client.clone(), upstream.clone());
            TokioExecutor::new().execute(async move {
                let mut server = auto::Builder::new(TokioExecutor::new());
                server.http1().timer(TokioTimer::new()).header_read_timeout(None);
                server.http2().timer(TokioTimer::new());
                let service = service_fn(move |request| forward(client.clone(), upstream.clone(), request));
                let _ended = server.serve_connection(TokioIo::new(io), service).await;
            });
        }
    })
}
