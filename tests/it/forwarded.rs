//! Who the client is, and what the backend is told of it.

use tempfile::tempdir;

use crate::harness::{Head, Proxy, Wire, backend::Recorder};

/// What the backend sees of a request with these fields, and who the log takes for its client.
async fn seen(yaml: &str, fields: &str) -> (Head, String) {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), yaml).await;
    let request = format!("GET / HTTP/1.1\r\nhost: a.example:81\r\nx-request-id: fwd-1\r\n{fields}\r\n");
    assert_eq!(proxy.ask(request).await.status(), 200);
    let line = proxy.access_line("fwd-1").await;
    (backend.only().head, line["client_ip"].as_str().unwrap_or("nobody").to_owned())
}

const TRUSTING: &str = "hygiene: { trusted_proxies: private }";

#[tokio::test(flavor = "multi_thread")]
async fn from_a_stranger_nothing_is_believed() {
    let (head, client) = seen(
        "",
        "x-forwarded-for: 6.6.6.6\r\nX-Forwarded-For: 7.7.7.7\r\nx-forwarded-proto: https\r\n\
         x-forwarded-host: evil.example\r\nx-forwarded-port: 443\r\nx-forwarded-prefix: /evil\r\n\
         forwarded: for=6.6.6.6;proto=https\r\nx-real-ip: 6.6.6.6\r\n",
    )
    .await;
    assert_eq!(head.get("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(head.get("x-forwarded-proto"), Some("http"));
    assert_eq!(head.get("x-forwarded-host"), Some("a.example:81"));
    assert_eq!(head.get("x-real-ip"), Some("127.0.0.1"));
    for gone in ["forwarded", "x-forwarded-port", "x-forwarded-prefix"] {
        assert_eq!(head.get(gone), None, "{head:?}");
    }
    assert_eq!(head.get("host"), Some("a.example:81"));
    assert_eq!(client, "127.0.0.1");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_trusted_proxy_says_is_kept_and_added_to() {
    let (head, client) = seen(
        TRUSTING,
        "x-forwarded-for: 203.0.113.9\r\nx-forwarded-proto: https\r\nx-forwarded-host: shop.example\r\n\
         x-forwarded-port: 443\r\nforwarded: for=203.0.113.9;proto=https\r\n",
    )
    .await;
    assert_eq!(head.get("x-forwarded-for"), Some("203.0.113.9, 127.0.0.1"));
    assert_eq!(head.get("x-forwarded-proto"), Some("https"));
    assert_eq!(head.get("x-forwarded-host"), Some("shop.example"));
    assert_eq!(head.get("x-forwarded-port"), Some("443"));
    let forwarded = head.get("forwarded").unwrap();
    assert!(forwarded.starts_with("for=203.0.113.9;proto=https, for=127.0.0.1"), "{forwarded}");
    assert_eq!(client, "203.0.113.9");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_is_the_nearest_that_is_not_trusted() {
    for (list, expected) in [
        // Three proxies; the client claims to be somebody else.
        ("6.6.6.6, 203.0.113.9, 10.0.0.3, 10.0.0.2", "203.0.113.9"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("203.0.113.9, nonsense, 10.0.0.2", "10.0.0.2"),
        ("203.0.113.9, unknown", "127.0.0.1"),
        ("203.0.113.9,, ,10.0.0.2,", "203.0.113.9"),
        ("203.0.113.9:4711", "203.0.113.9"),
        ("[2001:db8::1]:443, 192.168.0.1:80", "2001:db8::1"),
        ("2001:db8::1, fe80::1%eth0", "2001:db8::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
    ] {
        let (head, client) = seen(TRUSTING, &format!("x-forwarded-for: {list}\r\n")).await;
        assert_eq!(client, expected, "{list}");
        assert_eq!(head.get("x-forwarded-for"), Some(&*format!("{list}, 127.0.0.1")), "the list itself stays");
    }
    let (head, client) = seen(TRUSTING, "x-forwarded-for: 203.0.113.9\r\nx-forwarded-for: 10.0.0.2\r\n").await;
    assert_eq!(client, "203.0.113.9");
    assert_eq!(head.get("x-forwarded-for"), Some("203.0.113.9, 10.0.0.2, 127.0.0.1"), "two lines are one list");
    let (_, client) =
        seen("hygiene: { trusted_proxies: [\"192.0.2.0/24\"] }", "x-forwarded-for: 203.0.113.9\r\n").await;
    assert_eq!(client, "127.0.0.1", "the peer is not in that list");
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_cannot_take_away_what_sidegate_says() {
    for yaml in ["", TRUSTING] {
        let (head, _) = seen(
            yaml,
            "connection: x-forwarded-for, x-forwarded-proto, X-Forwarded-Host, x-request-id, via, x-real-ip, host\r\n\
             x-forwarded-for: 203.0.113.9\r\n",
        )
        .await;
        assert!(head.get("x-forwarded-for").unwrap().ends_with("127.0.0.1"), "{head:?}");
        for name in ["x-forwarded-proto", "x-forwarded-host", "host", "via"] {
            assert!(head.get(name).is_some(), "{name}: {head:?}");
        }
        assert_eq!(head.get("x-request-id"), Some("fwd-1"));
        assert_eq!(head.get("connection"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_underscore_is_no_disguise() {
    let (head, client) = seen(
        "",
        "X_Forwarded_For: 6.6.6.6\r\nx-forwarded_proto: https\r\nx_request_id: forged\r\nX_Real_IP: 6.6.6.6\r\n\
         x_api_key: k\r\n",
    )
    .await;
    for gone in ["x_forwarded_for", "x-forwarded_proto", "x_request_id", "x_real_ip"] {
        assert_eq!(head.get(gone), None, "{head:?}");
    }
    assert_eq!(head.get("x_api_key"), Some("k"), "other names are the application's own");
    assert_eq!(client, "127.0.0.1");
}

#[tokio::test(flavor = "multi_thread")]
async fn via_is_added_behind_those_before_and_may_be_left_out() {
    let (head, _) = seen("", "via: 1.0 first, 1.1 second\r\n").await;
    let all = head.all("via").join(", ");
    assert!(all.starts_with("1.0 first, 1.1 second, 1.1 sidegate-"), "{all}");
    let (head, _) = seen("hygiene: { via: false }", "").await;
    assert_eq!(head.get("via"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_behind_a_unix_socket_is_nobody_unless_a_trusted_proxy_names_it() {
    for (yaml, expected, client) in [("", "unknown", "nobody"), (TRUSTING, "203.0.113.9", "203.0.113.9")] {
        let directory = tempdir().unwrap();
        let socket = directory.path().join("front.sock");
        let backend = Recorder::ok().await;
        let listen = format!("listen: [\"127.0.0.1:0\", \"unix:{}\"]\n{yaml}", socket.display());
        let proxy = Proxy::before(&backend.url(), &listen).await;
        let mut wire = Wire::new(tokio::net::UnixStream::connect(&socket).await.unwrap());
        wire.send("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: fwd-1\r\nx-forwarded-for: 203.0.113.9\r\n\r\n").await;
        assert_eq!(wire.answer().await.status(), 200);
        assert_eq!(backend.only().head.get("x-forwarded-for"), Some(expected));
        let line = proxy.access_line("fwd-1").await;
        assert_eq!(line["client_ip"].as_str().unwrap_or("nobody"), client);
    }
}

// PROXY protocol: only where the listener asks for it.

const PROXIED: &str = "listen: { address: \"127.0.0.1:0\", proxy_protocol: true }";

/// A version 2 header that names `203.0.113.9:4711` as the client.
fn version_2(command: u8) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend([0x20 | command, 0x11, 0, 12, 203, 0, 113, 9, 127, 0, 0, 1]);
    header.extend(4711u16.to_be_bytes());
    header.extend(80u16.to_be_bytes());
    header
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_header_names_the_client() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), PROXIED).await;
    let headers: [(Vec<u8>, &str); 5] = [
        (b"PROXY TCP4 203.0.113.9 127.0.0.1 4711 80\r\n".to_vec(), "203.0.113.9"),
        (b"PROXY TCP6 2001:db8::1 ::1 4711 80\r\n".to_vec(), "2001:db8::1"),
        (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1"),
        (version_2(1), "203.0.113.9"),
        (version_2(0), "127.0.0.1"), // LOCAL: a health check of the balancer's own
    ];
    for (turn, (header, client)) in headers.into_iter().enumerate() {
        let id = format!("proxied-{turn}");
        let mut wire = proxy.connect().await;
        // In two parts: the header may arrive without the request.
        wire.send(&header).await;
        wire.send(format!("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: {id}\r\nx-forwarded-for: 6.6.6.6\r\n\r\n")).await;
        assert_eq!(wire.answer().await.status(), 200, "{turn}");
        assert_eq!(backend.requests()[turn].head.get("x-forwarded-for"), Some(client));
        assert_eq!(proxy.access_line(&id).await["client_ip"], client);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_proxy_header_a_connection_comes_to_nothing() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), PROXIED).await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
        b"PROXY TCP4 203.0.113.9\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PROXY TCP4 999.0.113.9 127.0.0.1 4711 80\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"PROXY TCP9 203.0.113.9 127.0.0.1 4711 80\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c............GET / HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let mut wire = proxy.connect().await;
        wire.send(bytes).await;
        let (answer, _) = wire.rest().await;
        assert!(answer.is_empty(), "{}: {}", bytes.escape_ascii(), answer.escape_ascii());
    }
    let mut wire = proxy.connect().await;
    wire.try_send([b"PROXY TCP4 ".to_vec(), vec![b'1'; 4096]].concat()).await.ok();
    assert!(wire.rest().await.0.is_empty(), "a line of more than 107 bytes is none");
    assert!(backend.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_header_that_nobody_asked_for_is_no_request() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for header in [b"PROXY TCP4 203.0.113.9 127.0.0.1 4711 80\r\n".to_vec(), version_2(1)] {
        let mut wire = proxy.connect().await;
        wire.send([&header[..], b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"].concat()).await;
        let (answer, _) = wire.rest().await;
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{}", answer.escape_ascii());
    }
    assert!(backend.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_header_that_is_not_finished_is_not_waited_for() {
    let backend = Recorder::ok().await;
    let yaml = format!("{PROXIED}\ndefaults: {{ timeouts: {{ client_header: 200ms }} }}");
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    for part in [&b""[..], b"PROXY TCP4 203", b"\r\n\r\n\0\r\nQUIT\n\x21\x11"] {
        let mut wire = proxy.connect().await;
        wire.send(part).await;
        wire.ended().await;
    }
}
