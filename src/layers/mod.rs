//! The policies, one module each, in the order of the request path.
//!
//! A module imports from floors below and never another policy. What two of them share travels as a typed
//! request extension:
//!
//! | layer | writes | reads |
//! |---|---|---|
//! | [`request_id`] | `RequestId` | |
//! | [`access_log`] | `Exchange` | `RequestId` |
//! | [`security_headers`] | | `Exchange` (https) |
//! | [`errors`] | `Exchange` (error, cause) | `RequestId`, `Exchange` |
//! | [`hygiene`] | `Exchange` (client address, https) | `Connection` |
//! | [`cors`] | | |
//! | [`heartbeat`] | | |
//! | [`sse_error_event`] | `Exchange` (error, cause, what cut it) | `RequestId`, `Exchange` |
//! | [`auth`] | `Principal`, `Exchange` (principal) | `Exchange` (client address), `Connection` |
//! | [`session`] | `Session`, `Exchange` (session) | `Principal`, `Exchange` (https), `Connection` |
//! | [`body_limit`] | | |
//! | [`rate_limit`] | `Exchange` (rule, tunnel) | `Principal`, `Parameters`, `Exchange` (client address, bytes, tunnel, cache) |
//! | [`cache`] | `Exchange` (cache, what cut it), `Latecomers` | `Principal`, `Session`, `Parameters`, `Deadline`, `Exchange` (https, fallback) |
//! | [`concurrency`] | `Exchange` (tunnel) | `Exchange` (tunnel) |
//! | [`deadline`] | `Deadline`, `Exchange` (what cut it) | `Latecomers` |
//! | [`fallback`] | `Replay`, `Undecided`, `Exchange` (upstream, fallback) | |
//! | [`retry`] | `Replay`, `Tried`, `Undecided`, `Exchange` (retries) | `Replay`, `Deadline` |
//! | [`stream_start`] | | `Undecided`, `Exchange` (bytes received) |
//! | [`circuit_breaker`] | `Exchange` (upstream, endpoint) | `Exchange` (time of the last byte received) |
//! | [`timeouts`] | `TunnelIdle` | `Exchange` (bytes received) |

pub mod access_log;
pub mod auth;
pub mod body_limit;
pub mod cache;
pub mod circuit_breaker;
pub mod concurrency;
pub mod cors;
pub mod deadline;
pub mod errors;
pub mod fallback;
pub mod heartbeat;
pub mod hygiene;
pub mod rate_limit;
pub mod request_id;
pub mod retry;
pub mod security_headers;
pub mod session;
pub mod sse_error_event;
pub mod stream_start;
pub mod timeouts;
