//! One look over a header section, so that what is not there costs nothing later.

use http::{HeaderMap, header};

/// What a header section holds of the fields that hygiene deals with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Survey {
    /// Bytes on an HTTP/1 wire: names, values, and four for `: ` and the line's end.
    pub(super) bytes: usize,
    /// How many `Host` lines.
    pub(super) hosts: usize,
    /// How many `Content-Length` lines.
    pub(super) lengths: usize,
    /// How many `Transfer-Encoding` lines.
    pub(super) codings: usize,
    marks: u8,
}

/// A field that concerns this connection only.
pub(super) const HOP: u8 = 1;
/// `Via`.
pub(super) const VIA: u8 = 2;
/// `Max-Forwards`.
pub(super) const MAX_FORWARDS: u8 = 4;
/// `X-Forwarded-For`, `-Proto` or `-Host`.
pub(super) const FORWARDED_FOR: u8 = 8;
/// `Forwarded`, `X-Real-IP` or another `X-Forwarded-*`.
pub(super) const FORWARDED: u8 = 16;
/// A name with an underscore.
pub(super) const UNDERSCORE: u8 = 32;

impl Survey {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        for (name, value) in headers {
            found.bytes += name.as_str().len() + value.len() + 4;
            found.marks |= match *name {
                header::HOST => {
                    found.hosts += 1;
                    0
                }
                header::CONTENT_LENGTH => {
                    found.lengths += 1;
                    0
                }
                header::TRANSFER_ENCODING => {
                    found.codings += 1;
                    HOP
                }
                header::CONNECTION
                | header::TE
                | header::UPGRADE
                | header::PROXY_AUTHENTICATE
                | header::PROXY_AUTHORIZATION => HOP,
                header::VIA => VIA,
                header::MAX_FORWARDS => MAX_FORWARDS,
                header::FORWARDED => FORWARDED,
                _ => by_text(name.as_str()),
            };
        }
        found
    }

    /// Whether any of `marks` was found.
    pub(super) fn has(self, marks: u8) -> bool {
        self.marks & marks != 0
    }
}

fn by_text(name: &str) -> u8 {
    match name {
        "keep-alive" | "proxy-connection" | "proxy" => HOP,
        "x-forwarded-for" | "x-forwarded-proto" | "x-forwarded-host" => FORWARDED_FOR,
        "x-real-ip" => FORWARDED,
        _ if name.as_bytes().contains(&b'_') => UNDERSCORE,
        _ if name.starts_with("x-forwarded-") => FORWARDED,
        _ => 0,
    }
}
