//! A client's network, as those count who count by address.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Whom an address stands for: itself if it is an IPv4 one, else its /64, within which whoever has one address has them
/// all. An IPv4-mapped address is the IPv4 address.
///
/// ```
/// use sidegate::message::Net;
///
/// let net = |ip: &str| Net::of(ip.parse().unwrap());
/// assert_eq!(net("2001:db8:1:2::1"), net("2001:db8:1:2:ffff::9"));
/// assert_eq!(net("2001:db8:1:2::1").to_string(), "2001:db8:1:2::/64");
/// assert_eq!(net("::ffff:192.0.2.1").to_string(), "192.0.2.1");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Net {
    /// An address.
    V4(Ipv4Addr),
    /// The first address of a /64.
    V6(Ipv6Addr),
}

impl Net {
    /// That of `ip`.
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self::V4(ip),
            IpAddr::V6(ip) => Self::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
        }
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(ip) => ip.fmt(f),
            Self::V6(first) => write!(f, "{first}/64"),
        }
    }
}
