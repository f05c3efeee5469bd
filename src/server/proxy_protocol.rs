//! The PROXY protocol, versions 1 and 2: who the client is, said by the load balancer before the first byte.
//!
//! Only where the listener asks for it, and then of every connection: to guess would let any client claim an address
//! (§2 of HAProxy's `proxy-protocol.txt`), and, where the listener says so, only from those who may. The header is read to its last byte and no further, so that
//! what follows, TLS or HTTP, is untouched; `ppp` takes it apart. Version 2's `LOCAL` and version 1's `UNKNOWN`
//! stand for the connection itself; a CRC32C that is given must be right.

use std::{fmt, io, net::SocketAddr};

use ppp::{v1, v2};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::message::Peer;

/// The longest header of version 1, with its line end.
const MAX_V1: usize = 107;
/// The longest header of version 2 that is read: the protocol allows 64 KiB, but what is sent are addresses and
/// a few short TLVs, at most those of a client's certificate.
const MAX_V2: usize = 4096;
/// What version 2 says before its addresses: signature, command, family, length.
const V2_START: usize = 16;
/// The type of the TLV with the checksum.
const CRC32C: u8 = 0x03;

/// A connection that does not begin with a header.
#[derive(Debug)]
pub(super) enum Refused {
    /// Something else came.
    Missing,
    /// It is not what the protocol says, or too long.
    Malformed(&'static str),
    /// It ended, or broke off.
    Lost(io::Error),
    /// Whoever connected may not say who the client is.
    Untrusted,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("no PROXY protocol header"),
            Self::Malformed(why) => write!(f, "malformed PROXY protocol header: {why}"),
            Self::Untrusted => f.write_str("the peer may not speak for clients: it is not in `proxy_protocol.from`"),
            Self::Lost(_) => f.write_str("the connection ended within the PROXY protocol header"),
        }
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Lost(error) => Some(error),
            Self::Missing | Self::Malformed(_) | Self::Untrusted => None,
        }
    }
}

/// Reads a header, and not a byte more. `None` where it stands for the connection itself.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Peer>, Refused> {
    let mut header = [0; MAX_V2];
    // The shortest of version 1 is longer than this.
    let signature = v2::PROTOCOL_PREFIX.len();
    fill(stream, &mut header[..signature]).await?;
    if header[..signature] == *v2::PROTOCOL_PREFIX {
        fill(stream, &mut header[signature..V2_START]).await?;
        let length = V2_START + usize::from(u16::from_be_bytes([header[V2_START - 2], header[V2_START - 1]]));
        let rest = header.get_mut(V2_START..length).ok_or(Refused::Malformed("too long"))?;
        fill(stream, rest).await?;
        return version_2(&mut header[..length]);
    }
    if !header.starts_with(b"PROXY ") {
        return Err(Refused::Missing);
    }
    let mut read = signature;
    while header[read - 1] != b'\n' {
        // Without a carriage return at the end, two bytes at least are still to come.
        let more = if header[read - 1] == b'\r' { 1 } else { 2 };
        if read + more > MAX_V1 {
            return Err(Refused::Malformed("too long"));
        }
        fill(stream, &mut header[read..read + more]).await?;
        // The first of the two may be the end of a malformed line: no more is read then.
        if more == 2 && header[read] == b'\n' {
            return Err(Refused::Malformed("not ended by CR LF"));
        }
        read += more;
    }
    version_1(&header[..read])
}

async fn fill(stream: &mut (impl AsyncRead + Unpin), buf: &mut [u8]) -> Result<(), Refused> {
    stream.read_exact(buf).await.map(drop).map_err(Refused::Lost)
}

fn version_1(header: &[u8]) -> Result<Option<Peer>, Refused> {
    let header = v1::Header::try_from(header).map_err(|_| Refused::Malformed("not a line of version 1"))?;
    Ok(match header.addresses {
        v1::Addresses::Tcp4(it) => Some(Peer::tcp(SocketAddr::new(it.source_address.into(), it.source_port))),
        v1::Addresses::Tcp6(it) => Some(Peer::tcp(SocketAddr::new(it.source_address.into(), it.source_port))),
        v1::Addresses::Unknown => None,
    })
}

fn version_2(bytes: &mut [u8]) -> Result<Option<Peer>, Refused> {
    let header = v2::Header::try_from(&*bytes).map_err(|_| Refused::Malformed("not of version 2"))?;
    let peer = match (header.command, header.addresses) {
        (v2::Command::Local, _) | (v2::Command::Proxy, v2::Addresses::Unspecified) => None,
        (v2::Command::Proxy, v2::Addresses::IPv4(it)) => {
            Some(Peer::tcp(SocketAddr::new(it.source_address.into(), it.source_port)))
        }
        (v2::Command::Proxy, v2::Addresses::IPv6(it)) => {
            Some(Peer::tcp(SocketAddr::new(it.source_address.into(), it.source_port)))
        }
        (v2::Command::Proxy, v2::Addresses::Unix(_)) => Some(Peer::Unix),
    };
    let mut at = header.len() - header.tlv_bytes().len();
    let mut checksum = None;
    for tlv in header.tlvs() {
        let tlv = tlv.map_err(|_| Refused::Malformed("a TLV is cut short"))?;
        let value = at + 3;
        at = value + tlv.value.len();
        if tlv.kind == CRC32C {
            let sum = <[u8; 4]>::try_from(&*tlv.value).map_err(|_| Refused::Malformed("a checksum of another size"))?;
            checksum = Some((value, u32::from_be_bytes(sum)));
        }
    }
    if let Some((at, sum)) = checksum {
        // The sum was made over the header with zeros in the sum's place.
        bytes[at..at + 4].fill(0);
        if crc32c(bytes) != sum {
            return Err(Refused::Malformed("the checksum is wrong"));
        }
    }
    Ok(peer)
}

/// CRC-32C (Castagnoli; RFC 3720 appendix B.4), bit by bit: once per connection, over a hundred bytes or so.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (POLYNOMIAL & (sum & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    /// What comes of `bytes`, and what is left of them. `None` where more bytes are waited for.
    fn reading(mut bytes: &[u8]) -> (Result<Option<Peer>, Refused>, &[u8]) {
        let read = read(&mut bytes).now_or_never().expect("a slice never keeps one waiting");
        (read, bytes)
    }

    #[expect(clippy::unnecessary_wraps, reason = "that is how it is compared")]
    fn tcp(address: &str) -> Option<Peer> {
        Some(Peer::Tcp(address.parse().unwrap()))
    }

    fn v2_header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let mut header = v2::PROTOCOL_PREFIX.to_vec();
        header.extend([0x20 | command, family]);
        header.extend(u16::try_from(rest.len()).unwrap().to_be_bytes());
        header.extend(rest);
        header
    }

    #[test]
    fn version_1_names_the_client() {
        let (read, rest) = reading(b"PROXY TCP4 203.0.113.7 10.0.0.1 56324 443\r\nGET / HTTP/1.1\r\n");
        assert_eq!(read.unwrap(), tcp("203.0.113.7:56324"));
        assert_eq!(rest, b"GET / HTTP/1.1\r\n");
        let (read, _) = reading(b"PROXY TCP6 2001:db8::7 ::1 56324 443\r\n");
        assert_eq!(read.unwrap(), tcp("[2001:db8::7]:56324"));
        let (read, rest) = reading(b"PROXY UNKNOWN\r\nGET");
        assert_eq!((read.unwrap(), rest), (None, &b"GET"[..]));
    }

    #[test]
    fn version_2_names_the_client_or_the_connection() {
        let v4 = [203, 0, 113, 7, 10, 0, 0, 1, 0xdc, 4, 1, 187];
        let (read, _) = reading(&v2_header(1, 0x11, &v4));
        assert_eq!(read.unwrap(), tcp("203.0.113.7:56324"));
        let (read, _) = reading(&v2_header(0, 0x11, &v4));
        assert_eq!(read.unwrap(), None, "LOCAL");
        let (read, _) = reading(&v2_header(1, 0x00, b""));
        assert_eq!(read.unwrap(), None, "no addresses");
        let (read, _) = reading(&v2_header(1, 0x31, &[0; 216]));
        assert_eq!(read.unwrap(), Some(Peer::Unix));
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let wrong: [&[u8]; 12] = [
            b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00",
            b"PROXYxTCP4 1.1.1.1 1.1.1.1 1 1\r\n",
            b"PROXY TCP4 1.1.1.256 1.1.1.1 1 1\r\n",
            b"PROXY TCP4 1.1.1.1 1.1.1.1 1 65536\r\n",
            b"PROXY TCP4 1.1.1.1 1.1.1.1 01 1\r\n",
            b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\n",
            b"PROXY TCP6 1.1.1.1 1.1.1.1 1 1\r\n",
            b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1",
            &[b'P'; 300],
            &v2_header(2, 0x11, &[0; 12]),
            &v2_header(1, 0x11, &[0; 11]),
        ];
        for bytes in wrong {
            assert!(reading(bytes).0.is_err(), "{}", bytes.escape_ascii());
        }
        let long = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 200], b"\r\n"].concat();
        assert!(
            matches!(reading(&long), (Err(Refused::Malformed("too long")), rest) if rest.len() >= long.len() - MAX_V1)
        );
        let long = v2_header(0, 0, &[0; MAX_V2]);
        assert!(matches!(reading(&long), (Err(Refused::Malformed("too long")), rest) if rest.len() == MAX_V2));
    }

    #[test]
    fn a_checksum_must_be_right() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let mut header = v2_header(1, 0x11, &[203, 0, 113, 7, 10, 0, 0, 1, 0xdc, 4, 1, 187, CRC32C, 0, 4, 0, 0, 0, 0]);
        let sum = crc32c(&header).to_be_bytes();
        let at = header.len() - 4;
        header[at..].copy_from_slice(&sum);
        assert_eq!(reading(&header).0.unwrap(), tcp("203.0.113.7:56324"));
        header[20] ^= 1;
        assert!(matches!(reading(&header).0, Err(Refused::Malformed("the checksum is wrong"))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>, start in 0..4_usize) {
            let start: &[u8] = [b"".as_slice(), b"PROXY ", b"PROXY TCP4 ", v2::PROTOCOL_PREFIX][start];
            drop(reading(&[start, &bytes].concat()));
        }

        #[test]
        fn a_header_is_read_to_its_end_and_no_further(
            v4: bool, source: u128, port: u16, second: bool, tail: Vec<u8>, tlv in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            #[expect(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
            let (v4_source, v6_source) = (Ipv4Addr::from(source as u32), Ipv6Addr::from(source));
            let header = match (second, v4) {
                (false, true) => format!("PROXY TCP4 {v4_source} 10.0.0.1 {port} 443\r\n").into_bytes(),
                (false, false) => format!("PROXY TCP6 {v6_source} ::1 {port} 443\r\n").into_bytes(),
                (true, v4) => {
                    let (address, family): (Vec<u8>, _) =
                        if v4 { (v4_source.octets().into(), 0x11) } else { (v6_source.octets().into(), 0x21) };
                    let mut rest = [address.clone(), address, port.to_be_bytes().into(), vec![1, 187]].concat();
                    rest.extend([0xe0, 0, u8::try_from(tlv.len()).unwrap()]);
                    rest.extend(tlv);
                    v2_header(1, family, &rest)
                }
            };
            let ip = if v4 { v4_source.into() } else { v6_source.into() };
            let all = [header, tail.clone()].concat();
            let (read, rest) = reading(&all);
            prop_assert_eq!(read.unwrap(), Some(Peer::tcp(SocketAddr::new(ip, port))));
            prop_assert_eq!(rest, &tail[..]);
        }
    }
}
