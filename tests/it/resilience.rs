//! Three real applications behind one name, while they are killed, hang, come back, or are all gone.

use std::{
    collections::HashMap,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{task::JoinSet, time::MissedTickBehavior};

use crate::harness::{Fastapi, Message, Proxy, Wire, eventually, figure};

/// The applications, the files in which they note their orders, and the ports that they keep over a restart.
struct Fleet {
    members: Vec<Option<Fastapi>>,
    ports: Vec<u16>,
    notes: TempDir,
}

const NAMES: [&str; 3] = ["one", "two", "three"];

impl Fleet {
    async fn start() -> Self {
        let mut fleet = Self { members: Vec::new(), ports: Vec::new(), notes: TempDir::new().unwrap() };
        for name in NAMES {
            let member = fleet.member(name, 0).await;
            fleet.ports.push(member.port());
            fleet.members.push(Some(member));
        }
        fleet
    }

    async fn member(&self, name: &str, port: u16) -> Fastapi {
        let note = self.note(name);
        Fastapi::app("member", port, &[("NAME", name), ("RECEIVED", note.to_str().unwrap())]).await
    }

    fn note(&self, name: &str) -> PathBuf {
        self.notes.path().join(name)
    }

    fn endpoints(&self) -> String {
        let urls: Vec<_> = self.ports.iter().map(|port| format!("\"http://127.0.0.1:{port}\"")).collect();
        format!("[{}]", urls.join(", "))
    }

    fn signal(&self, member: usize, signal: Signal) {
        self.members[member].as_ref().expect("it runs").signal(signal);
    }

    /// Ends a member as `kill -9` does.
    fn kill(&mut self, member: usize) {
        self.members[member].take();
    }

    async fn restart(&mut self, member: usize) {
        self.members[member] = Some(self.member(NAMES[member], self.ports[member]).await);
    }

    /// How often each order arrived, at whichever member.
    fn orders(&self) -> HashMap<String, u32> {
        let mut orders = HashMap::new();
        for note in NAMES.iter().filter_map(|name| fs::read_to_string(self.note(name)).ok()) {
            note.lines().for_each(|order| *orders.entry(order.to_owned()).or_default() += 1);
        }
        orders
    }
}

/// What clients saw, by who answered.
#[derive(Default)]
struct Seen {
    /// The names of the members that answered, in order.
    by: Mutex<Vec<String>>,
    /// GETs that were answered with anything but 200.
    failed: Mutex<Vec<String>>,
    /// Orders that were answered with an error, with what it said.
    lost: Mutex<HashMap<String, String>>,
    taken: AtomicU32,
}

/// Clients that ask as long as they are there: 20 with ten GETs a second each, four with ten orders a second.
struct Load {
    seen: Arc<Seen>,
    over: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    fn on(address: SocketAddr) -> Self {
        let (seen, over) = (Arc::<Seen>::default(), Arc::<AtomicBool>::default());
        let mut clients = JoinSet::new();
        for client in 0..24 {
            clients.spawn(Self::client(client, address, Arc::clone(&seen), Arc::clone(&over)));
        }
        Self { seen, over, clients }
    }

    async fn client(number: u32, address: SocketAddr, seen: Arc<Seen>, over: Arc<AtomicBool>) {
        let mut turn = tokio::time::interval(Duration::from_millis(100));
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut wire = Wire::to(address).await;
        for order in 0.. {
            turn.tick().await;
            if over.load(Ordering::Relaxed) {
                return;
            }
            if number < 20 {
                wire.send("GET /work HTTP/1.1\r\nhost: api\r\n\r\n").await;
                let answer = wire.answer().await;
                match answer.status() {
                    200 => seen.by.lock().push(by(&answer)),
                    _ => seen.failed.lock().push(answer.text()),
                }
            } else {
                let order = format!("{number}-{order}");
                wire.send(format!("POST /orders/{order} HTTP/1.1\r\nhost: api\r\ncontent-length: 2\r\n\r\n{{}}")).await;
                let answer = wire.answer().await;
                match answer.status() {
                    201 => drop(seen.taken.fetch_add(1, Ordering::Relaxed)),
                    _ => drop(seen.lost.lock().insert(order, answer.text())),
                }
            }
        }
    }

    /// Waits for so many more GETs to be answered, and returns the names of those who did.
    async fn answered(&self, more: usize) -> Vec<String> {
        let from = self.seen.by.lock().len();
        eventually("the load to go on", || async { self.seen.by.lock().len() >= from + more }).await;
        self.seen.by.lock()[from..from + more].to_vec()
    }

    async fn end(mut self) -> Arc<Seen> {
        self.over.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        self.seen
    }
}

fn by(answer: &Message) -> String {
    answer.json()["by"].as_str().expect("a name").to_owned()
}

fn share(by: &[String], name: &str) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "hundreds")]
    let share = by.iter().filter(|known| *known == name).count() as f64 / by.len() as f64;
    share
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_killed_costs_no_get_and_no_order_that_was_not_sent_and_comes_back_slowly() {
    let mut fleet = Fleet::start().await;
    let yaml = format!(
        "upstreams:
  api:
    endpoints: {}
    balance: {{ slow_start: 4s }}
    circuit_breaker: {{ consecutive_failures: 3, recovery: 200ms, max_recovery: 400ms }}
    health: {{ active: {{ path: /health, interval: 100ms, jitter: 20ms, healthy: 2, unhealthy: 2 }} }}
routes:
  - upstream: api
    retry: {{ attempts: 3 }}
",
        fleet.endpoints()
    );
    let proxy = Proxy::start(&yaml).await;
    let load = Load::on(proxy.address());
    let before = load.answered(200).await;
    assert!(NAMES.iter().all(|name| share(&before, name) > 0.2), "all take part: {before:?}");

    fleet.kill(0);
    load.answered(20).await; // those under way
    let without = load.answered(200).await;
    assert!(share(&without, "one") == 0.0, "nobody is sent to a dead one");

    fleet.restart(0).await;
    eventually("traffic to return", || async { load.seen.by.lock().iter().rev().take(20).any(|name| name == "one") })
        .await;
    let at_first = share(&load.answered(160).await, "one");
    load.answered(800).await;
    let at_last = share(&load.answered(300).await, "one");
    figure(&format!("the share of a member that came back: {at_first:.2} at first, {at_last:.2} at last"));
    assert!(at_first < 0.22, "a third would be its part: {at_first}");
    assert!(at_last > 0.25, "and that it gets in the end: {at_last}");

    let seen = load.end().await;
    assert_eq!(*seen.failed.lock(), [""; 0], "no client saw an error for GET");
    let lost = seen.lost.lock();
    assert!(lost.values().all(|error| error.contains("upstream-reset")), "only what was sent is lost: {lost:?}");
    assert!(lost.len() <= 4, "no more than were under way: {lost:?}");
    let orders = fleet.orders();
    assert!(orders.values().all(|times| *times == 1), "none is sent twice: {orders:?}");
    let (taken, arrived) = (seen.taken.load(Ordering::Relaxed) as usize, orders.len());
    assert!((taken..=taken + lost.len()).contains(&arrived), "{arrived} arrived, {taken} were answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_hangs_is_left_alone_until_it_wakes() {
    let fleet = Fleet::start().await;
    let yaml = format!(
        "upstreams:
  api:
    endpoints: {}
    circuit_breaker: {{ consecutive_failures: 3, recovery: 500ms, max_recovery: 500ms }}
routes:
  - upstream: api
    timeouts: {{ first_byte: 400ms }}
    retry: {{ attempts: 3, on: [connect, reset, timeout] }}
",
        fleet.endpoints()
    );
    let proxy = Proxy::start(&yaml).await;
    let load = Load::on(proxy.address());
    load.answered(600).await;
    let state = async || {
        let breakers = proxy.admin_get("/circuit-breakers").await.json();
        let of =
            |breaker: &serde_json::Value| breaker["endpoint"].as_str().unwrap().ends_with(&fleet.ports[1].to_string());
        let breakers = breakers["circuit_breakers"].as_array().unwrap();
        breakers.iter().find(|breaker| of(breaker)).unwrap()["state"].as_str().unwrap().to_owned()
    };
    assert_eq!(state().await, "closed");
    fleet.signal(1, Signal::STOP);
    eventually("its breaker to open", || async { state().await == "open" }).await;
    let without = load.answered(100).await;
    assert!(share(&without, "two") < 0.05, "the others do its work");

    fleet.signal(1, Signal::CONT);
    eventually("its breaker to close", || async { state().await == "closed" }).await;
    load.answered(50).await;
    let again = share(&load.answered(200).await, "two");
    assert!(again > 0.2, "it takes its part again: {again}");
    let seen = load.end().await;
    assert_eq!(*seen.failed.lock(), [""; 0], "no client saw an error for GET");
    let orders = fleet.orders();
    assert!(orders.values().all(|times| *times == 1), "none is sent twice: {orders:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_are_gone_the_next_upstream_answers_and_then_the_fixed_answer() {
    let mut fleet = Fleet::start().await;
    let spare = fleet.member("spare", 0).await;
    let yaml = format!(
        "upstreams:
  api:
    endpoints: {}
    circuit_breaker: {{ consecutive_failures: 2, recovery: 200ms }}
  spare: {{ endpoints: [\"{}\"] }}
  offline: {{ respond: {{ status: 503, json: {{ by: nobody }} }} }}
routes:
  - upstream: api
    retry: {{}}
    fallback: [spare, offline]
",
        fleet.endpoints(),
        spare.url()
    );
    let proxy = Proxy::start(&yaml).await;
    assert!(NAMES.contains(&&*by(&proxy.get("/work").await)));
    (0..3).for_each(|member| fleet.kill(member));
    for _ in 0..30 {
        let answer = proxy.get("/work").await;
        assert_eq!((answer.status(), &*by(&answer)), (200, "spare"));
    }
    drop(spare);
    let answer = proxy.get("/work").await;
    assert_eq!((answer.status(), &*by(&answer)), (503, "nobody"));
    fleet.restart(2).await;
    eventually("the first upstream to answer again", || async { by(&proxy.get("/work").await) == "three" }).await;
}
