//! Whether an answer may be stored, and how long it may be used (RFC 9111 §3 and §4.2).
//!
//! All of it is decided once, when the answer arrives, and kept as a few numbers. A request for a stored answer is then
//! decided by comparing them with the clock: no date is parsed and no field looked up again.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{
    HeaderMap, HeaderName, Method, StatusCode,
    header::{AGE, AUTHORIZATION, DATE, EXPIRES, LAST_MODIFIED, SET_COOKIE},
    request, response,
};

use super::{
    date::{self, LATEST, since_epoch},
    directives::{self, MAX_SECONDS, MaxStale, Scope, Seconds},
    validate, vary,
};

/// A tenth of the time since the last change (§4.2.2), but not longer: who publishes a new version expects it to be
/// seen the next day.
const HEURISTIC_CAP: u64 = 24 * HOUR;
/// An error that says of itself how long it may be used is believed so long where the operator says nothing: enough
/// for a stampede to meet one of them. It is rarely meant; frameworks add `max-age` to whatever they send.
const ERROR_CAP: u64 = 1000;
/// The longest that an operator can have an error kept for that may be over the next moment.
const NEGATIVE_CAP: u64 = 10_000;
/// How long a stale answer with a validator is kept to be validated: as long again as it was fresh, within these.
const KEEP: (u64, u64) = (HOUR, 24 * HOUR);
/// At least so long in Redis, where what was fresh for a second is worth little room.
const SHARE: u64 = 60_000;
/// The longest time of any kind, in milliseconds: §1.2.2.
const MOST: u64 = MAX_SECONDS as u64 * 1000;
const HOUR: u64 = 3_600_000;
/// How far a clock may go back to be put right, and the parts of a store be apart.
const SLACK: u64 = 1000;

/// What the operator says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Rules {
    /// Fresh for so long from its arrival, whatever the answer says, `no-cache` and `must-revalidate` included. Not
    /// `no-store`, `private` and the rest of what forbids to store it. For what is heuristically cacheable and no
    /// error: 200, 203, 204, 300, 301, 308. Nor for an answer to `Authorization`, unless `keyed_by_credential`.
    pub(super) ttl: Option<Duration>,
    /// The same for 404, 405, 410, 414 and 501 that do not say it themselves, and for 429, 500, 502, 503 and 504, of
    /// which it is also the most (never more than 10 s, and 1 s if not given).
    pub(super) negative_ttl: Option<Duration>,
    /// Instead of the answer's own.
    pub(super) stale_while_revalidate: Option<Duration>,
    /// Instead of the answer's own.
    pub(super) stale_if_error: Option<Duration>,
    /// Nothing counts of what the answer says in `Cache-Control`, `Pragma` and `Expires`.
    pub(super) ignore_cache_control: bool,
    /// Whoever gets the stored answer has sent the same credential, for it is part of the key.
    ///
    /// §3.5 keeps an answer to `Authorization` from others than who asked. With such a key there are no others, so the
    /// purpose is met; the letter is not, and a backend may still want to see each use of a credential that it can
    /// revoke. So the operator must have said more than that: with `POST`, to cache it at all; with `GET`, a `ttl`.
    pub(super) keyed_by_credential: bool,
}

/// Why an answer is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    Method,
    RequestNoStore,
    Status,
    Partial,
    NoStore,
    Private,
    SetCookie,
    VaryStar,
    Authorization,
    /// Must be validated before each use, and cannot be.
    NoCache,
    /// Nothing says how long.
    NoFreshness,
    /// Too old when it came, and nothing to validate it by.
    Stale,
}

impl Why {
    /// As the `detail` of `Cache-Status`: a token.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::RequestNoStore => "request-no-store",
            Self::Status => "status",
            Self::Partial => "partial",
            Self::NoStore => "no-store",
            Self::Private => "private",
            Self::SetCookie => "set-cookie",
            Self::VaryStar => "vary-star",
            Self::Authorization => "authorization",
            Self::NoCache => "no-cache",
            Self::NoFreshness => "no-freshness",
            Self::Stale => "stale",
        }
    }
}

/// What may be done with a stored answer for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verdict {
    /// It is served.
    Fresh,
    /// It is served, and validated behind it (RFC 5861 §3).
    Refresh,
    /// It is served, for the client said that it may be stale.
    Stale,
    /// It is validated first, or fetched again.
    Validate,
}

/// How long a stored answer may be used. Times are milliseconds, lengths of it at most 2^31 seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Life {
    /// When it came, since the epoch.
    received: u64,
    /// How old it was then (§4.2.3).
    initial_age: u64,
    /// The age from which on it is stale.
    lifetime: u64,
    stale_while_revalidate: u64,
    stale_if_error: u64,
    /// It can be asked for anew by an entity tag or a date.
    validator: bool,
    /// Never served stale, whoever permits it (§4.2.4).
    strict: bool,
}

/// What a status means for a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Heuristically cacheable (RFC 9110 §15.1), and what the operator's `ttl` is about.
    Lasting,
    /// Heuristically cacheable errors.
    Negative,
    /// Errors that may be over the next moment.
    Transient,
    /// Errors of which the operator's configuration does not speak.
    Error,
    /// As long as it says itself.
    Other,
    /// About this one request: its credential, its preconditions, its size. To be stored by nobody, or others would
    /// get the answer to what they did not do.
    Own,
}

impl Class {
    fn of(status: StatusCode) -> Self {
        match status.as_u16() {
            200 | 203 | 204 | 300 | 301 | 308 => Self::Lasting,
            404 | 405 | 410 | 414 | 501 => Self::Negative,
            429 | 500 | 502..=504 => Self::Transient,
            // 206 and 304: §3. 416 and 412 are answers to fields that a stored answer is not selected by.
            100..=199 | 206 | 304 | 401 | 407 | 408 | 412 | 413 | 416 | 417 | 421 | 425 | 426 | 431 | 511 => Self::Own,
            400.. => Self::Error,
            _ => Self::Other,
        }
    }
}

/// Whether an answer is about its target, and not only about this one request, or this moment.
pub(super) fn is_of_target(status: StatusCode) -> bool {
    match Class::of(status) {
        Class::Lasting | Class::Other => true,
        Class::Negative => !status.is_server_error(),
        Class::Transient | Class::Error | Class::Own => false,
    }
}

/// Those with nothing about caching in their definition (RFC 9110 §15) that is not done here.
fn is_understood(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200..=204 | 300..=303 | 307 | 308 | 400 | 403..=406 | 409..=411 | 414 | 415 | 422 | 429)
        || matches!(status.as_u16(), 451 | 500..=505)
}

/// How long the answer to `request` may be used, which was sent at `requested` and answered at `received`.
///
/// To be asked again with the headers of [`validate::merge`] when a 304 came. `HEAD` has no answer worth storing, but
/// may renew one ([`validate::head_agrees`]): then `request` is the `GET` that it would be used for.
///
/// # Errors
/// [`Why`] it must not be stored, or is of no use.
pub(super) fn life(
    request: &request::Parts,
    response: &response::Parts,
    rules: &Rules,
    requested: SystemTime,
    received: SystemTime,
) -> Result<Life, Why> {
    let headers = &response.headers;
    let said =
        if rules.ignore_cache_control { directives::Response::default() } else { directives::Response::of(headers) };
    may_store(request, response, &said, rules)?;

    let (requested, received) = (since_epoch(requested), since_epoch(received));
    let age = age_field(headers);
    let date = date_of(headers, DATE).unwrap_or(received);
    let corrected = age.unwrap_or(0).saturating_add(received.saturating_sub(requested));
    let initial_age = received.saturating_sub(date).max(corrected).min(MOST);

    // What the operator says counts from the arrival. Over an answer to one credential that others could get with
    // another, or with none, the backend decides alone: `max-age=0, must-revalidate` would be how it looks at each.
    let class = Class::of(response.status);
    let shared_credential = request.headers.contains_key(AUTHORIZATION) && !rules.keyed_by_credential;
    let from_now = |ttl: Duration| initial_age.saturating_add(millis(ttl));
    let ttl = rules.ttl.filter(|_| class == Class::Lasting && !shared_credential).map(from_now);
    let negative = rules.negative_ttl.filter(|_| matches!(class, Class::Negative | Class::Transient)).map(from_now);

    let own = explicit(headers, &said, date, rules).or(negative);
    let own = own.or_else(|| heuristic(request, headers, class, &said, date));
    let no_cache = said.no_cache == Some(Scope::All);
    let unreadable = age.is_none() || said.open_quote;
    let own = if no_cache { Some(0) } else { own.map(|own| if unreadable { 0 } else { own }) };
    let revalidates = said.must_revalidate || said.proxy_revalidate || said.s_maxage.is_some();

    let mut life = Life {
        received,
        initial_age,
        lifetime: ttl.or(own).ok_or(Why::NoFreshness)?,
        stale_while_revalidate: window(rules.stale_while_revalidate, said.stale_while_revalidate),
        stale_if_error: window(rules.stale_if_error, said.stale_if_error),
        // What was POSTed is not asked for on a condition (RFC 9110 §13.1.2).
        validator: request.method == Method::GET && validate::has_validator(headers),
        strict: ttl.is_none() && (no_cache || unreadable || revalidates),
    };
    if let Some(cap) = cap(class, response.status, rules) {
        // Nothing is gained by knowing that an error is still the same one.
        life = Life {
            lifetime: life.lifetime.min(initial_age.saturating_add(cap)),
            validator: false,
            strict: true,
            ..life
        };
    }
    if life.strict {
        (life.stale_while_revalidate, life.stale_if_error) = (0, 0);
    }
    life.lifetime = life.lifetime.min(2 * MOST);
    if life.end(KEEP.0) <= received {
        return Err(if no_cache && ttl.is_none() { Why::NoCache } else { Why::Stale });
    }
    Ok(life)
}

/// §3 and §3.5.
fn may_store(
    request: &request::Parts,
    response: &response::Parts,
    said: &directives::Response,
    rules: &Rules,
) -> Result<(), Why> {
    let (headers, status) = (&response.headers, response.status);
    let post = request.method == Method::POST;
    if !post && request.method != Method::GET {
        return Err(Why::Method);
    }
    if directives::Request::of(&request.headers).no_store {
        return Err(Why::RequestNoStore);
    }
    if status == StatusCode::PARTIAL_CONTENT {
        return Err(Why::Partial);
    }
    // §5.2.2.3: who understands the status may disregard the `no-store` that stands beside it for the others.
    let understood = is_understood(status);
    if Class::of(status) == Class::Own || said.must_understand && !understood || post && status != StatusCode::OK {
        return Err(Why::Status);
    }
    if said.no_store && !(said.must_understand && understood) {
        return Err(Why::NoStore);
    }
    if said.private == Some(Scope::All) {
        return Err(Why::Private);
    }
    // `no-cache="set-cookie"` takes it out of what is stored, which is what it was made for.
    if headers.contains_key(SET_COOKIE)
        && (rules.ignore_cache_control || !directives::named_fields(headers).any(|name| name == SET_COOKIE))
    {
        return Err(Why::SetCookie);
    }
    if vary::is_star(headers) {
        return Err(Why::VaryStar);
    }
    if request.headers.contains_key(AUTHORIZATION) {
        let answers = said.public || said.must_revalidate || said.s_maxage.is_some();
        let operators = rules.keyed_by_credential && (post || rules.ttl.is_some());
        if !(answers && !said.open_quote || operators) {
            return Err(Why::Authorization);
        }
    }
    Ok(())
}

/// §4.2.1, for a shared cache.
fn explicit(headers: &HeaderMap, said: &directives::Response, date: u64, rules: &Rules) -> Option<u64> {
    if let Some(seconds) = said.s_maxage.or(said.max_age) {
        return Some(u64::from(seconds) * 1000);
    }
    if rules.ignore_cache_control {
        return None;
    }
    let mut all = headers.get_all(EXPIRES).iter();
    let first = all.next()?;
    // §5.3: what is no date, above all `0`, is past. So are two different ones: §4.2.1.
    let valid = all.all(|other| other == first);
    let expires = valid.then(|| date::parse(first.as_bytes())).flatten().unwrap_or(0);
    Some(expires.saturating_sub(date).min(MOST))
}

/// §4.2.2: only where nothing is said, and the status or `public` allows it. Not for `POST` (RFC 9110 §9.3.3).
fn heuristic(
    request: &request::Parts,
    headers: &HeaderMap,
    class: Class,
    said: &directives::Response,
    date: u64,
) -> Option<u64> {
    if request.method != Method::GET || !(matches!(class, Class::Lasting | Class::Negative) || said.public) {
        return None;
    }
    let modified = date_of(headers, LAST_MODIFIED)?;
    Some((date.saturating_sub(modified) / 10).min(HEURISTIC_CAP))
}

/// The longest that an answer of this status is used from its arrival.
fn cap(class: Class, status: StatusCode, rules: &Rules) -> Option<u64> {
    match (class, rules.negative_ttl.map(millis)) {
        (Class::Transient | Class::Error, Some(most)) => Some(most.min(NEGATIVE_CAP)),
        // 501: nothing that is over the next moment.
        (Class::Negative, Some(most)) if status.is_server_error() => Some(most),
        (Class::Transient | Class::Error, None) => Some(ERROR_CAP),
        (Class::Negative, None) if status.is_server_error() => Some(ERROR_CAP),
        _ => None,
    }
}

fn window(operators: Option<Duration>, own: Option<Seconds>) -> u64 {
    operators.map(millis).or(own.map(|seconds| u64::from(seconds) * 1000)).unwrap_or(0)
}

/// §5.1. None where it is not one number: an answer of unknown age, which is as good as too old. (The RFC would have
/// the first of several and no age at all for garbage; both make it younger than it may be.)
fn age_field(headers: &HeaderMap) -> Option<u64> {
    let mut all = headers.get_all(AGE).iter();
    let Some(first) = all.next() else { return Some(0) };
    let one = all.next().is_none().then_some(first.as_bytes().trim_ascii());
    one.and_then(directives::seconds).map(|seconds| u64::from(seconds) * 1000)
}

/// A field with a date that is one.
fn date_of(headers: &HeaderMap, name: HeaderName) -> Option<u64> {
    date::parse(headers.get(name)?.as_bytes())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).min(MOST)
}

impl Life {
    /// That of an answer which is for those who wait for it, and for nobody who comes later.
    pub(super) fn none(received: SystemTime) -> Self {
        Self {
            received: since_epoch(received),
            initial_age: 0,
            lifetime: 0,
            stale_while_revalidate: 0,
            stale_if_error: 0,
            validator: false,
            strict: true,
        }
    }

    /// When it came.
    pub(super) fn received(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.received)
    }

    /// §4.2.3. Never less than when it came, whatever the clock does.
    pub(super) fn age(&self, now: SystemTime) -> Duration {
        Duration::from_millis(self.age_millis(now))
    }

    fn age_millis(&self, now: SystemTime) -> u64 {
        self.initial_age + since_epoch(now).saturating_sub(self.received)
    }

    /// The seconds that it is still fresh, for `Cache-Status`: negative since when it is stale.
    pub(super) fn remaining(&self, now: SystemTime) -> i64 {
        let signed = |millis: u64| i64::try_from(millis).unwrap_or(i64::MAX);
        (signed(self.lifetime) - signed(self.age_millis(now))).div_euclid(1000)
    }

    /// How much longer it is fresh.
    pub(super) fn left(&self, now: SystemTime) -> Duration {
        Duration::from_millis(self.lifetime.saturating_sub(self.age_millis(now)))
    }

    /// What is to be done for a request that asks `asked`. `only-if-cached` is the caller's: 504 instead of
    /// [`Verdict::Validate`].
    ///
    /// A request's `no-store` speaks of its own answer (§5.2.1.5) and changes nothing here.
    pub(super) fn verdict(&self, asked: &directives::Request, now: SystemTime) -> Verdict {
        let age = self.age_millis(now);
        let too_old = asked.max_age.is_some_and(|most| most == 0 || age > millis_of(most));
        let left = self.lifetime.saturating_sub(age);
        if asked.no_cache || too_old || asked.min_fresh.is_some_and(|least| left < millis_of(least)) {
            return Verdict::Validate;
        }
        if left > 0 {
            return Verdict::Fresh;
        }
        // §5.2.1.1: who says how old it may be does not want it stale, unless that is said as well.
        let wants_fresh = asked.min_fresh.is_some() || asked.max_age.is_some() && asked.max_stale.is_none();
        if self.strict || wants_fresh {
            return Verdict::Validate;
        }
        let stale = age - self.lifetime;
        let bearable = match asked.max_stale {
            Some(MaxStale::Any) => true,
            Some(MaxStale::Seconds(most)) => stale <= millis_of(most),
            None => false,
        };
        if stale < self.stale_while_revalidate && (bearable || asked.max_stale.is_none()) {
            Verdict::Refresh
        } else if bearable {
            Verdict::Stale
        } else {
            Verdict::Validate
        }
    }

    /// Whether it may be served although validating failed: the upstream was not reached, or answered 500, 502, 503
    /// or 504 (RFC 5861 §4).
    ///
    /// By the longer of its own time and the client's, whatever else the request says of freshness: somebody who loads
    /// a page again because the backend is down (`max-age=0`) is who this is for. Only `no-cache` is stronger, unless
    /// it comes with `stale-if-error`.
    pub(super) fn is_stale_if_error(&self, asked: &directives::Request, now: SystemTime) -> bool {
        let asked_for = asked.stale_if_error.map_or(0, millis_of);
        let refused = asked.no_cache && asked.stale_if_error.is_none();
        match self.age_millis(now).checked_sub(self.lifetime) {
            _ if refused => false,
            None => true,
            Some(stale) => !self.strict && stale < self.stale_if_error.max(asked_for),
        }
    }

    /// When it is of no more use to anybody: its freshness and the longer of its stale times are over. With a validator
    /// it is kept for as long again as it was fresh, at least an hour and at most a day: to be asked by, it costs the
    /// upstream an empty 304.
    pub(super) fn keep_until(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.end(KEEP.0))
    }

    /// The same in a store that others need, too: with a validator as long again as it was fresh, at least a minute.
    pub(super) fn share_until(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.end(SHARE))
    }

    fn end(&self, least: u64) -> u64 {
        let keep = if self.validator { self.lifetime.clamp(least, KEEP.1) } else { 0 };
        let longest = keep.max(self.stale_while_revalidate).max(self.stale_if_error);
        self.received + self.lifetime.saturating_sub(self.initial_age) + longest
    }

    /// Makes it stale as of now. Its stale times run from here on: a soft purge.
    pub(super) fn expire(&mut self, now: SystemTime) {
        self.lifetime = self.lifetime.min(self.age_millis(now));
    }

    /// The same by another clock, which shows `there` when the one that it is by shows `here`, in milliseconds since the
    /// epoch. None where that one was set back: nobody knows any more how old it is.
    pub(super) fn by(&self, here: u64, there: u64) -> Option<Self> {
        let ahead = self.received.saturating_sub(here);
        let received = there.checked_sub(here.saturating_sub(self.received))?;
        (ahead <= SLACK).then_some(Self { received, ..*self })
    }

    /// What [`Self::encode`] begins with. 2: `received` is by the clock of the store.
    pub(super) const VERSION: u8 = 2;
    /// How many bytes [`Self::encode`] makes.
    pub(super) const ENCODED: usize = 42;

    /// For the store: a version, the flags, five numbers with the large end first.
    pub(super) fn encode(&self) -> [u8; Self::ENCODED] {
        let mut bytes = [0; Self::ENCODED];
        let [version, flags, numbers @ ..] = &mut bytes;
        (*version, *flags) = (Self::VERSION, u8::from(self.validator) | u8::from(self.strict) << 1);
        let all = [self.received, self.initial_age, self.lifetime, self.stale_while_revalidate, self.stale_if_error];
        for (slot, number) in numbers.chunks_exact_mut(8).zip(all) {
            slot.copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    /// What [`Self::encode`] made; None of what it cannot have made. There is no checksum: that is for whoever stores
    /// the body beside it.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::ENCODED] = bytes.try_into().ok()?;
        let [version, flags, numbers @ ..] = bytes;
        let mut all = [0; 5];
        for (number, slot) in all.iter_mut().zip(numbers.chunks_exact(8)) {
            *number = u64::from_be_bytes(slot.try_into().ok()?);
        }
        let [received, initial_age, lifetime, stale_while_revalidate, stale_if_error] = all;
        let life = Self {
            received,
            initial_age,
            lifetime,
            stale_while_revalidate,
            stale_if_error,
            validator: flags & 1 != 0,
            strict: flags & 2 != 0,
        };
        let times = received <= LATEST && lifetime <= 2 * MOST;
        let lengths = [initial_age, stale_while_revalidate, stale_if_error].iter().all(|&length| length <= MOST);
        (*version == Self::VERSION && *flags < 4 && times && lengths).then_some(life)
    }
}

fn millis_of(seconds: Seconds) -> u64 {
    u64::from(seconds) * 1000
}

#[cfg(test)]
mod tests;
