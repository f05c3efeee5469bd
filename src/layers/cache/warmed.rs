//! What the file says is kept warm: a URL, or a path.

use std::{fmt, str::FromStr};

use http::{
    HeaderValue, Method, Request, Uri,
    header::{HOST, USER_AGENT},
    uri::{Authority, PathAndQuery, Scheme},
};

use crate::{
    config::text,
    message::headers::{X_FORWARDED_HOST, X_FORWARDED_PROTO},
};

/// A URL, or a path, that is asked for: `https://api.example.com/tools`, or `/tools?all`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warmed {
    /// Where clients ask for it, and whether over TLS.
    origin: Option<(Authority, bool)>,
    target: PathAndQuery,
}

impl Warmed {
    /// Whether it says by what host it is asked for.
    #[must_use]
    pub fn has_host(&self) -> bool {
        self.origin.is_some()
    }

    /// The head of the request.
    ///
    /// # Panics
    /// Never: what it is made of was checked.
    #[must_use]
    pub fn request(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = Method::GET;
        *request.uri_mut() = Uri::from(self.target.clone());
        let headers = request.headers_mut();
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("sidegate/", env!("CARGO_PKG_VERSION"))));
        if let Some((authority, https)) = &self.origin {
            // As a client's would come.
            let host = HeaderValue::from_str(authority.as_str()).expect("an authority is visible ASCII");
            headers.insert(HOST, host.clone());
            headers.insert(X_FORWARDED_HOST, host);
            headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(if *https { "https" } else { "http" }));
        }
        request
    }

    /// Its path.
    pub(super) fn path(&self) -> &str {
        self.target.path()
    }

    /// Whether clients ask for it over TLS.
    pub(super) fn https(&self) -> bool {
        self.origin.as_ref().is_some_and(|(_, https)| *https)
    }
}

/// The text is no URL, and no path.
#[derive(Debug)]
pub struct NoUrl(String);

impl fmt::Display for NoUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is neither a path, `/tools?all`, nor a URL, `https://HOST[:PORT]/tools`", self.0)
    }
}

impl std::error::Error for NoUrl {}

impl FromStr for Warmed {
    type Err = NoUrl;

    fn from_str(text: &str) -> Result<Self, NoUrl> {
        let wrong = || NoUrl(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let parts = uri.into_parts();
        let target = parts.path_and_query.ok_or_else(wrong)?;
        let origin = match (parts.scheme, parts.authority) {
            (None, None) => None,
            (Some(scheme), Some(authority)) if scheme == Scheme::HTTP || scheme == Scheme::HTTPS => {
                Some((authority, scheme == Scheme::HTTPS))
            }
            _ => return Err(wrong()),
        };
        let has_user = origin.as_ref().is_some_and(|(authority, _)| authority.as_str().contains('@'));
        if has_user || text.contains('#') || !target.path().starts_with('/') {
            return Err(wrong());
        }
        Ok(Self { origin, target })
    }
}

impl fmt::Display for Warmed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((authority, https)) = &self.origin {
            write!(f, "{}://{authority}", if *https { "https" } else { "http" })?;
        }
        self.target.fmt(f)
    }
}

text!(Warmed, "Warmed", { "pattern": "^(https?://[^/]+)?/[^#]*$" });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_warm_is_a_path_or_a_url() {
        for (text, host) in [
            ("/api/tools", None),
            ("/api/tools?all&a=%20", None),
            ("http://localhost:8080/", Some("localhost:8080")),
            ("https://api.example/tools?x", Some("api.example")),
        ] {
            let warmed: Warmed = text.parse().unwrap();
            assert_eq!(warmed.to_string(), text);
            let request = warmed.request();
            assert_eq!(request.headers().get(HOST).map(|host| host.to_str().unwrap()), host);
            assert!(text.ends_with(&request.uri().to_string()), "{}", request.uri());
        }
        for wrong in
            ["", "tools", "api.example/tools", "ftp://a/b", "//a/b#c", "http://user:pass@a/", "/a b", "*", "/a#b"]
        {
            assert!(wrong.parse::<Warmed>().is_err(), "{wrong}");
        }
    }
}
