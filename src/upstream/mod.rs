//! Where requests go: the kinds of upstream, each a [`HttpService`](crate::message::HttpService) in the end.

pub mod address;
pub mod client;
mod connect;
mod gather;
mod pool;
pub mod respond;
mod tunnel;
mod upload;

pub use self::{address::Address, client::Client};
