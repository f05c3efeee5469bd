//! Where a request shows its credential: header fields and the query.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, Uri, header::AUTHORIZATION, uri::PathAndQuery};

use crate::message::path::decode;

/// A credential longer than this is none.
const MAX: usize = 16 << 10;

/// Where to look.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// A field whose value is an API key.
    pub(super) header: Option<HeaderName>,
    /// Whether `Authorization: Bearer` holds one.
    pub(super) bearer: bool,
    /// A parameter of the query, by its decoded name.
    pub(super) query: Option<Box<str>>,
}

/// A credential, as it was shown.
#[derive(PartialEq, Eq)]
pub(super) struct Shown<'a> {
    pub(super) text: Cow<'a, [u8]>,
    /// Whether it may be a token: a field that is named for keys holds keys only.
    pub(super) may_be_token: bool,
}

impl Places {
    /// The credential that a request shows; none if it shows none.
    ///
    /// # Errors
    /// It shows two different ones, or one that is malformed: which, without a value.
    pub(super) fn find<'a>(&self, headers: &'a HeaderMap, uri: &'a Uri) -> Result<Option<Shown<'a>>, &'static str> {
        let mut found: Option<Shown<'a>> = None;
        let mut add = |text: Cow<'a, [u8]>, may_be_token| {
            if text.is_empty() {
                return Err("a credential is empty");
            }
            if text.len() > MAX {
                return Err("a credential is too long");
            }
            match &mut found {
                Some(first) if first.text != text => Err("there are two different credentials"),
                Some(first) => {
                    first.may_be_token |= may_be_token;
                    Ok(())
                }
                None => {
                    found = Some(Shown { text, may_be_token });
                    Ok(())
                }
            }
        };
        if let Some(name) = &self.header {
            let mut values = headers.get_all(name).into_iter();
            if let Some(value) = values.next() {
                add(value.as_bytes().trim_ascii().into(), false)?;
            }
            if values.next().is_some() {
                return Err("the key's field stands twice");
            }
        }
        if self.bearer {
            let mut values = headers.get_all(AUTHORIZATION).into_iter();
            if let Some(token) = values.next().and_then(|value| bearer(value.as_bytes())) {
                add(token.into(), true)?;
            }
            if values.next().is_some() {
                return Err("`authorization` stands twice");
            }
        }
        if let Some(name) = &self.query {
            let mut values = parameters(uri).filter(|parameter| is(parameter, name));
            if let Some(value) = values.next() {
                add(decode(value.split_once('=').map_or("", |(_, value)| value).as_bytes()), true)?;
            }
            if values.next().is_some() {
                return Err("the key's parameter stands twice");
            }
        }
        Ok(found)
    }

    /// Takes away whatever may be a credential. An `Authorization` of another scheme is the backend's.
    pub(super) fn remove(&self, headers: &mut HeaderMap, uri: &mut Uri) {
        if let Some(name) = &self.header {
            headers.remove(name);
        }
        if self.bearer && headers.get(AUTHORIZATION).is_some_and(|value| bearer(value.as_bytes()).is_some()) {
            headers.remove(AUTHORIZATION);
        }
        if let Some(name) = &self.query
            && parameters(uri).any(|parameter| is(parameter, name))
        {
            let rest: Vec<_> = parameters(uri).filter(|parameter| !is(parameter, name)).collect();
            let rest = rest.join("&");
            let target = if rest.is_empty() { uri.path().to_owned() } else { format!("{}?{rest}", uri.path()) };
            let mut parts = std::mem::take(uri).into_parts();
            // Parts of a target that was one are one again.
            parts.path_and_query = PathAndQuery::try_from(target).ok();
            *uri = Uri::from_parts(parts).unwrap_or_default();
        }
    }
}

fn parameters(uri: &Uri) -> impl Iterator<Item = &str> {
    uri.query().into_iter().flat_map(|query| query.split('&'))
}

/// Whether a parameter has this name. Decoded, as the backend will: `api%5Fkey` is `api_key`.
fn is(parameter: &str, name: &str) -> bool {
    let found = parameter.split_once('=').map_or(parameter, |(name, _)| name);
    *decode(found.as_bytes()) == *name.as_bytes()
}

/// What stands after `Bearer`, in whatever case (RFC 9110 §11.1); `None` for another scheme. What is no `b64token`
/// (RFC 6750 §2.1) is empty.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer";
    let value = value.trim_ascii();
    let (scheme, token) =
        value.split_at_checked(SCHEME.len()).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(SCHEME))?;
    debug_assert!(scheme.is_ascii());
    let token = match token {
        [] => return Some(b""),
        [b' ' | b'\t', token @ ..] => token.trim_ascii(),
        _ => return None,
    };
    let in_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(byte);
    Some(if token.iter().all(in_token) { token } else { b"" })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn places() -> Places {
        Places { header: Some(HeaderName::from_static("x-api-key")), bearer: true, query: Some("api_key".into()) }
    }

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let field = |&(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        fields.iter().map(field).collect()
    }

    fn find(fields: &[(&'static str, &str)], uri: &str) -> Result<Option<String>, &'static str> {
        let (headers, uri) = (headers(fields), uri.parse().unwrap());
        let found = places().find(&headers, &uri)?;
        Ok(found.map(|shown| String::from_utf8(shown.text.into_owned()).unwrap()))
    }

    #[test]
    fn a_credential_is_found_wherever_it_is() {
        let good = Ok(Some("abc".to_owned()));
        assert_eq!(find(&[("x-api-key", "abc")], "/"), good);
        for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
            assert_eq!(find(&[("authorization", &format!("{scheme} abc"))], "/"), good);
        }
        assert_eq!(find(&[("authorization", "Bearer \t abc ")], "/"), good);
        assert_eq!(find(&[], "/?a=b&api_key=abc"), good);
        assert_eq!(find(&[], "/?api%5Fkey=%61bc"), good, "in any spelling");
        assert_eq!(find(&[], "/?api_keys=abc&a"), Ok(None));
        assert_eq!(find(&[("authorization", "Basic abc")], "/"), Ok(None));
        assert_eq!(find(&[("authorization", "Bearerabc")], "/"), Ok(None), "another scheme");
    }

    #[test]
    fn the_same_credential_twice_is_one_and_two_different_ones_are_none() {
        let both = [("x-api-key", "abc"), ("authorization", "Bearer abc")];
        assert_eq!(find(&both, "/?api_key=abc"), Ok(Some("abc".to_owned())));
        let two = Err("there are two different credentials");
        assert_eq!(find(&both, "/?api_key=abd"), two);
        assert_eq!(find(&[("x-api-key", "abd"), ("authorization", "Bearer abc")], "/"), two);
    }

    #[test]
    fn what_is_malformed_is_said_to_be() {
        let empty = Err("a credential is empty");
        for fields in
            [("x-api-key", ""), ("x-api-key", "  "), ("authorization", "Bearer"), ("authorization", "Bearer a b")]
        {
            assert_eq!(find(&[fields], "/"), empty, "{fields:?}");
        }
        assert_eq!(find(&[], "/?api_key"), empty);
        assert_eq!(find(&[], "/?api_key="), empty);
        let twice = [("authorization", "Bearer a"), ("authorization", "Basic b")];
        assert_eq!(find(&twice, "/"), Err("`authorization` stands twice"));
        assert_eq!(find(&[("x-api-key", "a"), ("x-api-key", "a")], "/"), Err("the key's field stands twice"));
        assert_eq!(find(&[], "/?api_key=a&api_key=a"), Err("the key's parameter stands twice"));
        assert_eq!(find(&[("x-api-key", &"a".repeat(MAX + 1))], "/"), Err("a credential is too long"));
    }

    #[test]
    fn it_is_removed_and_nothing_else_is() {
        let mut headers = headers(&[("x-api-key", "a"), ("authorization", "bearer a"), ("accept", "*/*")]);
        for (uri, left) in [
            ("/p%41?a=%62&api_key=a&&c", "/p%41?a=%62&&c"),
            ("/p?api_key=a", "/p"),
            ("/p?api%5fkey=a&b", "/p?b"),
            ("http://h:1/p?api_key=a", "http://h:1/p"),
            ("/p?b", "/p?b"),
            ("*", "*"),
        ] {
            let mut uri: Uri = uri.parse().unwrap();
            places().remove(&mut headers, &mut uri);
            assert_eq!(uri, left);
        }
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["accept"]);
        let mut basic = self::headers(&[("authorization", "Basic eA==")]);
        places().remove(&mut basic, &mut Uri::default());
        assert!(basic.contains_key("authorization"), "the backend's own");
    }

    proptest! {
        #[test]
        fn no_field_makes_it_panic_and_none_is_left(value in prop::collection::vec(any::<u8>(), 0..40), query in "[a-z_=&%0-9]{0,40}") {
            if let Ok(value) = HeaderValue::from_bytes(&value) {
                let mut headers = HeaderMap::new();
                headers.insert(AUTHORIZATION, value.clone());
                headers.insert("x-api-key", value);
                let mut uri: Uri = format!("/?{query}").parse().unwrap();
                let _found = places().find(&headers, &uri);
                places().remove(&mut headers, &mut uri);
                prop_assert!(matches!(places().find(&headers, &uri), Ok(None)));
            }
        }

        #[test]
        fn a_bearer_token_is_read_back(token in "[A-Za-z0-9._~+/-]{1,60}={0,2}", spaces in 1..4_usize) {
            let value = format!("Bearer{}{token}", " ".repeat(spaces));
            prop_assert_eq!(bearer(value.as_bytes()), Some(token.as_bytes()));
        }
    }
}
