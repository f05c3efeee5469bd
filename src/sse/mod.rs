//! Server-sent events (WHATWG HTML §9.2), looked at and hardly ever changed.
//!
//! What passes through sidegate passes in the frames in which it came; nothing here takes an event stream apart and
//! puts it together again. Three questions are answered beside the stream: what kind of event has just ended
//! ([`Scanner`]), whether something may be said at this place without breaking into an event ([`Boundary`]), and how
//! many tokens a model server reports ([`Meter`]). One event may be taken out: the report that sidegate has asked for
//! and the client has not ([`UsageFilter`]). One line may be added to each: an `id`, by which a client can take the
//! stream up again ([`Labels`]).
//!
//! ```
//! use sidegate::sse::{Boundary, Event, Scanner};
//!
//! let (mut scanner, mut boundary) = (Scanner::new(), Boundary::new());
//! let mut frame: &[u8] = b": hello\n\ndata: {\"token\": \"a\"}\n\ndata: unfini";
//! boundary.pass(frame);
//! assert_eq!(scanner.next(&mut frame), Some(Event::Empty));
//! assert_eq!(scanner.next(&mut frame), Some(Event::Content));
//! assert_eq!(scanner.next(&mut frame), None);
//! assert!(!boundary.here());
//!
//! let mut frame: &[u8] = b"shed\n\ndata: {\"error\": {\"message\": \"out of memory\"}}\n\n";
//! boundary.pass(frame);
//! assert_eq!(scanner.next(&mut frame), Some(Event::Content));
//! assert_eq!(scanner.next(&mut frame), Some(Event::Error));
//! assert!(boundary.here());
//! ```

mod boundary;
mod bytes;
mod completion;
mod json;
mod numbering;
mod pieces;
mod scanner;
mod shape;
mod usage;

use http::{
    HeaderMap,
    header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE},
};

pub use self::{
    boundary::Boundary,
    completion::{Completion, Ended, Mark, Terminal, complete_json},
    numbering::{Labels, Numbering},
    scanner::{Event, Scanner},
    usage::{Frames, Meter, Usage, UsageFilter},
};

/// U+FEFF in UTF-8, which is ignored where a stream begins with it, and only there.
pub const BYTE_ORDER_MARK: [u8; 3] = [0xEF, 0xBB, 0xBF];

/// Whether a response with these headers is an event stream: `text/event-stream`, in any case, with any parameters.
#[must_use]
pub fn is_event_stream(headers: &HeaderMap) -> bool {
    const TYPE: &[u8] = b"text/event-stream";
    headers.get(CONTENT_TYPE).is_some_and(|value| {
        let value = value.as_bytes();
        value.get(..TYPE.len()).is_some_and(|start| start.eq_ignore_ascii_case(TYPE))
            && matches!(value.get(TYPE.len()), None | Some(b';' | b' ' | b'\t'))
    })
}

/// Whether a response with these headers is an event stream whose bytes are the events themselves: without a content
/// coding, inside of which nobody can see where an event ends.
#[must_use]
pub fn is_readable(headers: &HeaderMap) -> bool {
    is_event_stream(headers) && is_plain(headers)
}

/// Whether a body with these headers has no content coding.
fn is_plain(headers: &HeaderMap) -> bool {
    headers.get_all(CONTENT_ENCODING).iter().all(|value| value.as_bytes().eq_ignore_ascii_case(b"identity"))
}

/// Whether something may be said between the events of `response`: it is an event stream that [can be
/// read](is_readable), and its body has no known length, which leaves no room, as has that of an answer to `HEAD`.
#[must_use]
pub fn has_room<B: http_body::Body>(response: &http::Response<B>) -> bool {
    is_readable(response.headers())
        && !response.headers().contains_key(CONTENT_LENGTH)
        && response.body().size_hint().exact().is_none()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn an_event_stream_is_known_by_its_type() {
        let is = |value: &'static str| {
            is_event_stream(&HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(value))]))
        };
        assert!(is("text/event-stream") && is("Text/Event-Stream;charset=utf-8") && is("text/event-stream ; a=b"));
        assert!(!is("text/event-streams") && !is("text/event") && !is("") && !is_event_stream(&HeaderMap::new()));
    }

    #[test]
    fn a_coded_stream_cannot_be_read() {
        let stream = (CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        let coded = |value| (CONTENT_ENCODING, HeaderValue::from_static(value));
        assert!(is_readable(&HeaderMap::from_iter([stream.clone()])));
        assert!(is_readable(&HeaderMap::from_iter([stream.clone(), coded("identity")])));
        assert!(!is_readable(&HeaderMap::from_iter([stream, coded("gzip")])));
    }
}
