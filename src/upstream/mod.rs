//! Where requests go: the kinds of upstream, each a [`HttpService`](crate::message::HttpService) in the end.

pub mod address;
pub mod balance;
pub mod client;
mod connect;
mod gather;
pub mod health;
mod pool;
pub mod respond;
mod tunnel;
mod upload;

pub use self::{address::Address, client::Client};
