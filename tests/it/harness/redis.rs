//! Real Redis servers, each in a directory of its own and on a port that the system chose.

use std::{
    fmt::Write as _,
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{eventually, within};

/// How often another port is tried, where somebody took the one that was free.
const TRIES: usize = 10;

/// A running Redis. Dropped, it is killed.
pub struct Redis {
    child: Option<Child>,
    directory: TempDir,
    port: u16,
    options: Vec<String>,
    /// What ends before the port and the options: `--sentinel` reads a file.
    file: Option<PathBuf>,
}

impl Redis {
    /// An empty one without persistence.
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    /// One with these options of its command line, in which `DIR` stands for its directory.
    pub async fn with(options: &[&str]) -> Self {
        Self::begin(TempDir::new().unwrap(), options, None).await
    }

    async fn begin(directory: TempDir, options: &[&str], sentinel: Option<&str>) -> Self {
        let dir = directory.path().to_str().unwrap();
        let options: Vec<String> = options.iter().map(|option| option.replace("DIR", dir)).collect();
        let file = sentinel.map(|text| {
            let file = directory.path().join("sentinel.conf");
            fs::write(&file, text).unwrap();
            file
        });
        let mut redis = Self { child: None, directory, port: 0, options, file };
        for _ in 0..TRIES {
            redis.port = free_port();
            if redis.run().await {
                return redis;
            }
        }
        panic!("no redis-server came up; the last one wrote:\n{}", redis.logged());
    }

    /// Runs it on its port; whether it answers there.
    async fn run(&mut self) -> bool {
        let port = self.port.to_string();
        let mut command = Command::new("redis-server");
        command.args(&self.file).args(self.file.iter().map(|_| "--sentinel"));
        let tls = self.options.iter().any(|option| option == "--tls-port-here");
        let options = self.options.iter().filter(|option| *option != "--tls-port-here");
        let ports = if tls { ["--port", "0", "--tls-port", &port] } else { ["--port", &port, "--bind", "127.0.0.1"] };
        command.args(ports).args(["--loglevel", "notice"]);
        if self.file.is_none() {
            command.args(["--save", "", "--appendonly", "no"]);
        }
        let log = fs::File::create(self.directory.path().join("log")).unwrap();
        let child = command
            .args(options)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let mut child = child.unwrap_or_else(|error| panic!("redis-server: {error}; `scripts/setup test` installs it"));
        let up = within("redis-server to come up", async {
            loop {
                if child.try_wait().unwrap().is_some() {
                    return false;
                }
                if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                    return true;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        self.child = Some(child);
        up && self.child.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// A file of its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn logged(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Ends it at once; its connections break.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// Runs it again on the same port, empty.
    pub async fn restart(&mut self) {
        self.kill();
        for _ in 0..TRIES {
            if self.run().await {
                return;
            }
        }
        panic!("redis-server did not come up again:\n{}", self.logged());
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(self.child.as_ref().unwrap()), signal).unwrap();
    }

    /// Lets it hang: connections stay, nothing is answered.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    pub async fn flush_scripts(&self) {
        self.command(&["SCRIPT", "FLUSH"]).await;
    }

    pub async fn config_set(&self, key: &str, value: &str) {
        self.command(&["CONFIG", "SET", key, value]).await;
    }

    /// What it answers to a command, as it is on the wire.
    pub async fn command(&self, words: &[&str]) -> String {
        raw(self.address(), words).await
    }

    /// All its keys.
    pub async fn keys(&self) -> Vec<String> {
        let answer = self.command(&["KEYS", "*"]).await;
        answer.lines().skip(1).filter(|line| !line.starts_with('$')).map(str::to_owned).collect()
    }

    /// Asserts that every key has the prefix, the version and a time to live.
    pub async fn assert_all_expire(&self, prefix: &str) {
        for key in self.keys().await {
            assert!(key.starts_with(&format!("{prefix}:1:")), "{key}");
            let left = self.command(&["PTTL", &key]).await;
            assert!(!left.starts_with(":-1"), "{key} stays for ever");
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- redis-server {} logged:\n{}\n---", self.port, self.logged());
        }
        self.kill();
    }
}

fn free_port() -> u16 {
    // A node of a cluster listens on a second port, 10000 above.
    loop {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if port < 55_000 && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
            return port;
        }
    }
}

/// Sends a command over a connection of its own.
async fn raw(address: SocketAddr, words: &[&str]) -> String {
    within(&format!("an answer to {words:?}"), async {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut command = format!("*{}\r\n", words.len());
        for word in words {
            write!(command, "${}\r\n{word}\r\n", word.len()).unwrap();
        }
        stream.write_all(command.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while after(&answer).is_none() {
            if stream.read_buf(&mut answer).await.unwrap_or(0) == 0 {
                break;
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    })
    .await
}

/// What follows the whole answer that `bytes` begin with; nothing where it is not whole.
fn after(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.windows(2).position(|two| two == b"\r\n")?;
    let (line, rest) = (&bytes[..end], &bytes[end + 2..]);
    let number = || std::str::from_utf8(&line[1..]).unwrap().parse::<i64>().unwrap();
    match line[0] {
        b'$' => usize::try_from(number()).map_or(Some(rest), |length| rest.get(length + 2..)),
        b'*' => (0..number()).try_fold(rest, |rest, _| after(rest)),
        _ => Some(rest),
    }
}

/// Three primaries that share the slots.
pub struct Cluster(pub Vec<Redis>);

impl Cluster {
    pub async fn start() -> Self {
        let mut nodes = Vec::new();
        for _ in 0..3 {
            nodes.push(Redis::with(&["--cluster-enabled", "yes", "--cluster-config-file", "DIR/nodes.conf"]).await);
        }
        let slots = [("0", "5460"), ("5461", "10922"), ("10923", "16383")];
        for (node, (first, last)) in nodes.iter().zip(slots) {
            let answer = node.command(&["CLUSTER", "ADDSLOTSRANGE", first, last]).await;
            assert!(answer.starts_with("+OK"), "{answer}");
        }
        for node in &nodes[1..] {
            node.command(&["CLUSTER", "MEET", "127.0.0.1", &nodes[0].port().to_string()]).await;
        }
        for node in &nodes {
            eventually("the cluster to form", async || {
                let info = node.command(&["CLUSTER", "INFO"]).await;
                info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")
            })
            .await;
        }
        Self(nodes)
    }
}

/// A master, a replica of it and a Sentinel, which calls the master `mymaster`.
pub struct Watched {
    pub master: Redis,
    pub replica: Redis,
    pub sentinel: Redis,
}

impl Watched {
    pub async fn start() -> Self {
        let master = Redis::start().await;
        let port = master.port().to_string();
        let replica =
            Redis::with(&["--replicaof", &format!("127.0.0.1 {port}"), "--repl-diskless-sync-delay", "0"]).await;
        eventually("the replica to follow", async || {
            replica.command(&["INFO", "replication"]).await.contains("master_link_status:up")
        })
        .await;
        let file = format!(
            "sentinel monitor mymaster 127.0.0.1 {port} 1\nsentinel down-after-milliseconds mymaster 300\n\
             sentinel failover-timeout mymaster 2000\n"
        );
        let sentinel = Redis::begin(TempDir::new().unwrap(), &[], Some(&file)).await;
        eventually("the Sentinel to find the replica", async || {
            sentinel.command(&["SENTINEL", "replicas", "mymaster"]).await.contains(&replica.port().to_string())
        })
        .await;
        Self { master, replica, sentinel }
    }
}

/// A road to a server that takes its time, the same for every byte.
pub struct Slow {
    address: SocketAddr,
    delay: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Slow {
    pub async fn before(server: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let delay = Arc::new(AtomicU64::new(0));
        let mut tasks = JoinSet::new();
        let of_all = delay.clone();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let delay = of_all.clone();
                connections.spawn(async move {
                    let Ok(server) = tokio::net::TcpStream::connect(server).await else { return };
                    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                        (client.into_split(), server.into_split());
                    let there = async { tokio::io::copy(&mut from_client, &mut to_server).await.ok() };
                    let back = async {
                        let (queue, mut queued) = tokio::sync::mpsc::channel::<(Instant, Vec<u8>)>(1024);
                        let read = async move {
                            let mut buffer = vec![0; 16384];
                            while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                                let due = Instant::now() + Duration::from_millis(delay.load(Ordering::Relaxed));
                                if queue.send((due, buffer[..n].to_vec())).await.is_err() {
                                    break;
                                }
                            }
                        };
                        let write = async {
                            while let Some((due, bytes)) = queued.recv().await {
                                sleep_until(due).await;
                                if to_client.write_all(&bytes).await.is_err() {
                                    break;
                                }
                            }
                        };
                        tokio::join!(read, write);
                    };
                    // Where one side ends, both do.
                    tokio::select! { _ = there => {}, () = back => {} }
                });
            }
        });
        Self { address, delay, _tasks: tasks }
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// What each answer takes from now on.
    pub fn set_delay(&self, delay: Duration) {
        self.delay.store(u64::try_from(delay.as_millis()).unwrap(), Ordering::Relaxed);
    }
}
