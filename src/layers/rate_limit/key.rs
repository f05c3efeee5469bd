//! Whose counter a request uses.

use std::{borrow::Cow, fmt::Write};

use http::{Uri, request::Parts};
use ring::digest::{Context, SHA256};

use super::rule::KeyPart;
use crate::{
    message::{
        Net, Principal, Session,
        path::{Parameters, decode},
    },
    telemetry::exchange::client_ip,
};

/// Writes what `part` is in the request: an address, a network or the id of a principal as it is, and all else, which
/// may be a secret, as a digest. Where the request has none, its address.
pub(super) fn write(part: &KeyPart, route: &str, head: &Parts, out: &mut String) {
    let value = match part {
        KeyPart::Global => return,
        KeyPart::Route => return name(route, out),
        KeyPart::Ip => return address(head, out),
        KeyPart::Principal => match head.extensions.get::<Principal>() {
            Some(principal) => return id(&principal.identity, out),
            None => None,
        },
        KeyPart::Session => match head.extensions.get::<Session>().filter(|session| session.known) {
            Some(session) => return put(out, format_args!("session={}", session.id)),
            None => None,
        },
        KeyPart::Header(name) => only(head.headers.get_all(name).iter().map(|value| value.as_bytes().into())),
        KeyPart::Query(name) => parameter(&head.uri, name),
        KeyPart::Path(name) => head
            .extensions
            .get::<Parameters>()
            .and_then(|parameters| parameters.get(name))
            .map(|value| value.as_bytes().into()),
    };
    match value {
        Some(value) => digest(part, &value, out),
        None => address(head, out),
    }
}

/// Writes what `part` is where an operator names it so: an address for `ip`, an id for `principal`, else the value.
/// False where it is none.
pub(super) fn write_named(part: &KeyPart, route: &str, text: &str, out: &mut String) -> bool {
    match part {
        KeyPart::Global => {}
        KeyPart::Route => name(route, out),
        KeyPart::Ip => match text.parse() {
            Ok(ip) => put(out, format_args!("ip={}", Net::of(ip))),
            Err(_) => return false,
        },
        KeyPart::Principal => id(text, out),
        KeyPart::Session => put(out, format_args!("session={text}")),
        KeyPart::Header(_) | KeyPart::Query(_) | KeyPart::Path(_) => digest(part, text.as_bytes(), out),
    }
    true
}

/// Writes `text` behind what is there.
pub(super) fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a string takes everything");
}

fn name(route: &str, out: &mut String) {
    put(out, format_args!("route={route}"));
}

fn address(head: &Parts, out: &mut String) {
    match client_ip(&head.extensions) {
        Some(ip) => put(out, format_args!("ip={}", Net::of(ip))),
        // A Unix socket, or a proxy that does not say.
        None => out.push_str("ip=none"),
    }
}

/// Ids are no secrets, but may be of any length and have anything in them.
fn id(id: &str, out: &mut String) {
    let is_plain = id.len() <= 64 && id.bytes().all(|c| c.is_ascii_alphanumeric() || b"_-.@+".contains(&c));
    if is_plain {
        put(out, format_args!("principal={id}"));
    } else {
        digest(&KeyPart::Principal, id.as_bytes(), out);
    }
}

/// The first 128 bits of a SHA-256 that is nobody else's: not what a file of API keys has.
fn digest(part: &KeyPart, value: &[u8], out: &mut String) {
    let mut context = Context::new(&SHA256);
    let name = part.to_string();
    for text in [b"sidegate rate_limit".as_slice(), b"\0", name.as_bytes(), b"\0", value] {
        context.update(text);
    }
    put(out, format_args!("{name}#"));
    for byte in context.finish().as_ref().iter().take(16) {
        put(out, format_args!("{byte:02x}"));
    }
}

fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<Cow<'a, [u8]>> {
    let pairs = uri.query()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let own = pairs.filter(|(known, _)| *form_decoded(known) == *name.as_bytes());
    only(own.map(|(_, value)| form_decoded(value)))
}

/// As forms are read: a `+` is a space.
fn form_decoded(text: &str) -> Cow<'_, [u8]> {
    if text.contains('+') {
        Cow::Owned(decode(text.replace('+', " ").as_bytes()).into_owned())
    } else {
        decode(text.as_bytes())
    }
}

/// The value that all have. Where they differ it cannot be said which one the backend takes, and so who chooses them
/// must not choose a counter.
fn only<'a>(mut values: impl Iterator<Item = Cow<'a, [u8]>>) -> Option<Cow<'a, [u8]>> {
    let first = values.next()?;
    values.all(|value| value == first).then_some(first)
}
