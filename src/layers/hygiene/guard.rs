//! The fields that sidegate, or a proxy that it trusts, answers for.

use http::{HeaderMap, HeaderName, header};

use super::survey::{Survey, UNDERSCORE};
use crate::message::headers::{X_REQUEST_ID, X_SESSION_ID};

/// Fields that a client can neither take away, by naming them in `Connection`, nor forge by an underscore.
#[derive(Debug, Clone)]
pub(super) struct Guard {
    /// Beside the fixed ones.
    more: Vec<HeaderName>,
}

impl Guard {
    pub(super) fn new() -> Self {
        Self { more: vec![X_REQUEST_ID, X_SESSION_ID] }
    }

    pub(super) fn add(&mut self, name: HeaderName) {
        self.more.push(name);
    }

    /// Whether `name` is guarded; an underscore in it counts as a dash.
    pub(super) fn holds(&self, name: &str) -> bool {
        const FORWARDED: &str = "x-forwarded-";
        const FIXED: [HeaderName; 5] =
            [header::HOST, header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::VIA, header::FORWARDED];
        name.get(..FORWARDED.len()).is_some_and(|start| same(start, FORWARDED))
            || same(name, "x-real-ip")
            || FIXED.iter().chain(&self.more).any(|guarded| same(name, guarded.as_str()))
    }

    /// Removes fields like `X_Forwarded_For`: CGI and WSGI write dash and underscore the same way, so that a
    /// backend cannot tell the client's field from sidegate's. Other names with an underscore pass.
    pub(super) fn strip_lookalikes(&self, headers: &mut HeaderMap, survey: Survey) {
        if !survey.has(UNDERSCORE) {
            return;
        }
        let lookalike = |name: &&HeaderName| name.as_str().contains('_') && self.holds(name.as_str());
        let found: Vec<HeaderName> = headers.keys().filter(lookalike).cloned().collect();
        // A guarded name may itself have an underscore: `request_id.header` is the operator's to choose.
        for name in found.iter().filter(|name| !self.more.contains(name)) {
            headers.remove(name);
        }
    }
}

fn same(name: &str, guarded: &str) -> bool {
    let fold = |byte: u8| if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
    name.len() == guarded.len() && name.bytes().zip(guarded.bytes()).all(|(a, b)| fold(a) == fold(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sidegate_answers_for_is_guarded_in_any_spelling() {
        let mut guard = Guard::new();
        guard.add(HeaderName::from_static("my_id"));
        for name in ["Host", "x-forwarded-prefix", "X_Forwarded-For", "x_real_ip", "VIA", "X-Request-Id", "my-id"] {
            assert!(guard.holds(name), "{name}");
        }
        for name in ["", "x-forwarded", "x-forwardedfor", "authorization", "x_api_key", "é-forwarded-é"] {
            assert!(!guard.holds(name), "{name}");
        }
    }

    #[test]
    fn only_lookalikes_of_guarded_fields_are_removed() {
        let mut guard = Guard::new();
        guard.add(HeaderName::from_static("my_id"));
        let names = ["x_forwarded_for", "x-forwarded_proto", "content_length", "my_id", "x_other", "x-request-id"];
        let mut headers: HeaderMap = names
            .into_iter()
            .map(|name| (HeaderName::from_static(name), http::HeaderValue::from_static("v")))
            .collect();
        let survey = Survey::of(&headers);
        guard.strip_lookalikes(&mut headers, survey);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["my_id", "x-request-id", "x_other"]);
    }
}
