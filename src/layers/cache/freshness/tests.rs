//! Named after the section of RFC 9111, where it is not another one.

use http::{Request, Response};
use proptest::prelude::*;

use super::{super::directives::map, Verdict::*, *};

/// When the answers of these tests arrive: Thu, 18 Aug 2050 02:01:18 GMT.
const NOW: u64 = 2_544_400_878;
const ETAG: (&str, &str) = ("etag", "\"a\"");

type Fields<'a> = &'a [(&'a str, &'a str)];

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn text(time: SystemTime) -> String {
    httpdate::fmt_http_date(time)
}

/// An exchange, and what is decided of it.
#[derive(Clone)]
struct Case<'a> {
    method: Method,
    status: u16,
    request: Fields<'a>,
    response: Fields<'a>,
    rules: Rules,
}

fn case(response: Fields<'_>) -> Case<'_> {
    Case { method: Method::GET, status: 200, request: &[], response, rules: Rules::default() }
}

impl Case<'_> {
    /// For an answer that took `delay` seconds and came at [`NOW`].
    fn after(&self, delay: u64) -> Result<Life, Why> {
        let (mut request, ()) = Request::new(()).into_parts();
        request.method = self.method.clone();
        request.headers = map(self.request);
        let (mut response, ()) = Response::new(()).into_parts();
        response.status = StatusCode::from_u16(self.status).unwrap();
        response.headers = map(self.response);
        life(&request, &response, &self.rules, at(NOW - delay), at(NOW))
    }

    fn life(&self) -> Life {
        self.after(0).unwrap()
    }

    fn why(&self) -> Why {
        self.after(0).unwrap_err()
    }

    /// The seconds that it is fresh, and 0 where it is not stored.
    fn fresh(&self) -> i64 {
        self.after(0).map_or(0, |life| life.remaining(at(NOW)))
    }
}

fn fresh(response: Fields<'_>) -> i64 {
    case(response).fresh()
}

fn post(response: Fields<'_>) -> Case<'_> {
    Case { method: Method::POST, ..case(response) }
}

fn authorized(response: Fields<'_>) -> Case<'_> {
    Case { request: &[("authorization", "FOO")], ..case(response) }
}

fn with_status(status: u16, response: Fields<'_>) -> Case<'_> {
    Case { status, ..case(response) }
}

/// What is done `after` seconds for a request with this `Cache-Control`.
fn verdict(life: &Life, after: u64, asked: &str) -> Verdict {
    let asked = if asked.is_empty() { HeaderMap::new() } else { map(&[("cache-control", asked)]) };
    life.verdict(&directives::Request::of(&asked), at(NOW + after))
}

fn serves_on_error(life: &Life, after: u64, asked: &str) -> bool {
    life.is_stale_if_error(&directives::Request::of(&map(&[("cache-control", asked)])), at(NOW + after))
}

#[test]
fn section_3_the_method() {
    for method in ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "M-SEARCH"] {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        assert_eq!(Case { method, ..case(&[("cache-control", "max-age=60")]) }.why(), Why::Method);
    }
    let old = text(at(NOW - 1000));
    assert_eq!(post(&[("cache-control", "max-age=60")]).fresh(), 60);
    assert_eq!(post(&[("last-modified", &old)]).why(), Why::NoFreshness, "no guesses");
    let ttl = Rules { ttl: Some(secs(60)), ..Rules::default() };
    assert_eq!(Case { rules: ttl, ..post(&[]) }.fresh(), 60);
    for status in [201, 204, 301, 404, 500] {
        assert_eq!(Case { status, rules: ttl, ..post(&[("cache-control", "max-age=60")]) }.why(), Why::Status);
    }
}

#[test]
fn section_3_the_status_is_final_and_whole() {
    for status in [100, 101, 103, 304, 401, 407, 408, 412, 413, 416, 417, 421, 425, 426, 431] {
        assert_eq!(with_status(status, &[("cache-control", "max-age=60"), ETAG]).why(), Why::Status, "{status}");
    }
    let part = with_status(206, &[("cache-control", "max-age=60"), ("content-range", "bytes 0-1/2")]);
    assert_eq!(part.why(), Why::Partial);
}

#[test]
fn section_3_explicit_freshness_makes_any_other_status_cacheable() {
    for status in [200, 203, 204, 299, 301, 302, 303, 307, 308, 404, 410] {
        assert_eq!(with_status(status, &[("cache-control", "max-age=60")]).fresh(), 60, "{status}");
        assert_eq!(with_status(status, &[("cache-control", "max-age=0")]).why(), Why::Stale, "{status}");
    }
}

#[test]
fn section_3_no_store() {
    for value in ["no-store", "No-StOrE", "max-age=10000, no-store"] {
        assert_eq!(case(&[("cache-control", value), ETAG]).why(), Why::NoStore);
    }
    let asked = Case { request: &[("cache-control", "no-store")], ..case(&[("cache-control", "max-age=60")]) };
    assert_eq!(asked.why(), Why::RequestNoStore);
}

#[test]
fn section_5_2_2_3_must_understand() {
    let both = &[("cache-control", "max-age=60, must-understand, no-store")];
    assert_eq!(with_status(200, both).fresh(), 60, "the no-store is for others");
    for status in [206, 299, 499, 599, 999] {
        assert!(with_status(status, both).after(0).is_err(), "{status}");
    }
    assert_eq!(with_status(599, &[("cache-control", "max-age=60, must-understand")]).why(), Why::Status);
}

#[test]
fn section_5_2_2_7_private() {
    assert_eq!(case(&[("cache-control", "private, max-age=3600")]).why(), Why::Private);
    assert_eq!(case(&[("cache-control", "private=\"vary\", max-age=3600")]).why(), Why::Private);
    assert_eq!(fresh(&[("cache-control", "private=\"a\", max-age=3600")]), 3600);
}

#[test]
fn set_cookie_is_never_stored() {
    assert_eq!(case(&[("cache-control", "public, max-age=60"), ("set-cookie", "a=b")]).why(), Why::SetCookie);
    let named = case(&[("cache-control", "no-cache=\"Set-Cookie\", max-age=60"), ("set-cookie", "a=b")]);
    assert_eq!(named.fresh(), 60, "the rest is, as it says");
    let ignored = Rules { ttl: Some(secs(60)), ignore_cache_control: true, ..Rules::default() };
    assert_eq!(Case { rules: ignored, ..named }.why(), Why::SetCookie);
}

#[test]
fn section_4_1_vary_star() {
    assert_eq!(case(&[("cache-control", "max-age=60"), ("vary", "foo, *")]).why(), Why::VaryStar);
    assert_eq!(fresh(&[("cache-control", "max-age=60"), ("vary", "foo")]), 60);
}

#[test]
fn section_3_5_authorization_needs_the_answers_permission() {
    let expires = text(at(NOW + 60));
    assert_eq!(authorized(&[("expires", &expires), ("date", &text(at(NOW)))]).why(), Why::Authorization);
    assert_eq!(authorized(&[("cache-control", "max-age=60")]).why(), Why::Authorization);
    assert_eq!(authorized(&[("cache-control", "public=x, max-age=60")]).why(), Why::Authorization);
    assert_eq!(authorized(&[("cache-control", "x=\"public, max-age=60, public")]).why(), Why::Authorization);
    for permission in ["max-age=60, public", "max-age=60, must-revalidate", "s-maxage=60"] {
        assert_eq!(authorized(&[("cache-control", permission)]).fresh(), 60, "{permission}");
    }
}

#[test]
fn section_3_5_a_key_with_the_credential_and_the_operators_word() {
    let keyed = Rules { keyed_by_credential: true, ..Rules::default() };
    let with_ttl = Rules { ttl: Some(secs(90)), ..keyed };
    let to = |method: &Method, rules| Case {
        method: method.clone(),
        request: &[("authorization", "FOO")],
        rules,
        ..case(&[("cache-control", "max-age=60")])
    };
    assert_eq!(to(&Method::GET, keyed).why(), Why::Authorization);
    assert_eq!(to(&Method::GET, with_ttl).fresh(), 90);
    assert_eq!(to(&Method::POST, keyed).fresh(), 60);
    assert_eq!(to(&Method::POST, with_ttl).fresh(), 90);
    let alone = Rules { keyed_by_credential: false, ..with_ttl };
    assert_eq!(to(&Method::GET, alone).why(), Why::Authorization);
    assert_eq!(to(&Method::POST, alone).why(), Why::Authorization);
}

#[test]
fn section_3_5_a_ttl_does_not_open_what_the_backend_checks_each_time() {
    let rules = Rules { ttl: Some(secs(90)), ..Rules::default() };
    let response = &[("cache-control", "max-age=0, must-revalidate"), ETAG][..];
    let checked = Case { request: &[("authorization", "FOO")], rules, ..case(response) };
    assert_eq!(verdict(&checked.life(), 0, ""), Validate);
    assert_eq!(verdict(&Case { request: &[], ..checked }.life(), 0, ""), Fresh);
}

#[test]
fn section_4_2_1_what_counts_first() {
    let (date, later) = (text(at(NOW)), text(at(NOW + 100)));
    let all = [("cache-control", "max-age=60, s-maxage=30"), ("expires", &*later), ("date", &*date)];
    assert_eq!(fresh(&all), 30);
    assert_eq!(fresh(&[("cache-control", "max-age=60"), all[1], all[2]]), 60);
    assert_eq!(fresh(&all[1..]), 100);
    assert_eq!(fresh(&[("cache-control", "max-age=60"), ("expires", "0"), all[2]]), 60);
    assert_eq!(fresh(&[("cache-control", "max-age=0, s-maxage=60"), ("expires", "0")]), 60);
    assert_eq!(fresh(&[("cache-control", "max-age=0"), all[1], all[2]]), 0);
    assert_eq!(fresh(&[("cache-control", "max-age=1, max-age=60"), all[1], all[2]]), 0);
    assert_eq!(fresh(&[("cache-control", "max-age=99999999999")]), 1 << 31);
}

#[test]
fn section_4_2_1_dates() {
    for date in ["Thu, 18 Aug 2050 02:02:18 GMT", "Thursday, 18-Aug-50 02:02:18 GMT", "Thu Aug 18 02:02:18 2050"] {
        assert_eq!(fresh(&[("expires", date)]), 60, "{date}");
    }
    assert!(fresh(&[("expires", "Thu Sep  1 02:02:18 2050")]) > 60, "one digit");
    for date in [
        "0",
        "",
        "-1",
        "never",
        "THU, 18 AUG 2050 02:02:18 GMT",
        "Fri, 18 Aug 2050 02:02:18 GMT",
        "Thu, 18 Aug 2050 02:02:18 UTC",
        "Thu, 18 Aug 2050 02:02:18 +0000",
        "Thu, 18 Aug 50 02:02:18 GMT",
        "Thu 18 Aug 2050 02:02:18 GMT",
        "Thu, 18 Aug 2050 2:02:18 GMT",
        "Thu, 32 Aug 2050 02:02:18 GMT",
        "Thu, 18 Aug 2050 02:02:18 GMT, Thu, 18 Aug 2050 02:02:18 GMT",
        "2544400938",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        "Thu, 18 Aug 1950 02:02:18 GMT",
    ] {
        assert_eq!(case(&[("expires", date)]).why(), Why::Stale, "{date}");
        assert_eq!(case(&[("expires", date), ETAG]).fresh(), 0, "{date}");
    }
}

#[test]
fn section_4_2_1_several_expires() {
    let (near, far) = (text(at(NOW + 60)), text(at(NOW + 61)));
    assert_eq!(fresh(&[("expires", &near), ("expires", &near)]), 60);
    assert_eq!(fresh(&[("expires", &near), ("expires", &far)]), 0);
}

#[test]
fn section_4_2_1_expires_is_measured_by_the_upstreams_clock() {
    let of = |expires: u64, date: u64| fresh(&[("expires", &text(at(expires))), ("date", &text(at(date)))]);
    assert_eq!(of(NOW + 300, NOW + 400), 0);
    assert_eq!(of(NOW, NOW), 0);
    assert_eq!(of(NOW + 400, NOW + 300), 100);
    assert_eq!(of(NOW + 100, NOW - 50), 100, "50 of which are over");
    assert_eq!(fresh(&[("expires", &text(at(NOW + 10))), ("date", "foo")]), 10, "no date: when it came");
}

#[test]
fn section_4_2_2_a_guess_where_nothing_is_said() {
    let ago = |seconds: u64| text(at(NOW - seconds));
    let (day, date) = (ago(86_400), text(at(NOW)));
    let response = &[("last-modified", &*day), ("date", &*date)][..];
    for status in [200, 203, 204, 300, 301, 308, 404, 405, 410, 414] {
        assert_eq!(with_status(status, response).fresh(), 8640, "{status}");
    }
    for status in [201, 202, 302, 307, 403, 500, 502, 503, 504, 599] {
        assert_eq!(with_status(status, response).why(), Why::NoFreshness, "{status}");
    }
    let public = &[("last-modified", &*day), ("date", &*date), ("cache-control", "public")][..];
    assert_eq!(with_status(202, public).fresh(), 8640);
    assert_eq!(with_status(599, public).fresh(), 1, "an error");
    assert_eq!(fresh(&[("last-modified", &ago(86_400 * 365))]), 86_400, "not longer than a day");
    assert_eq!(case(&[("last-modified", &text(at(NOW + 5)))]).fresh(), 0);
    assert_eq!(case(&[]).why(), Why::NoFreshness);
    assert_eq!(case(&[ETAG]).why(), Why::NoFreshness);
    assert_eq!(fresh(&[("last-modified", &day), ("expires", "0")]), 0, "never where something is said");
}

#[test]
fn section_4_2_3_the_age() {
    let (old, fast) = (text(at(NOW - 30)), text(at(NOW + 30)));
    let age = |delay, response: Fields<'_>| {
        let fields = [&[("cache-control", "max-age=600")], response].concat();
        case(&fields).after(delay).unwrap().age(at(NOW)).as_secs()
    };
    assert_eq!(age(0, &[]), 0);
    assert_eq!(age(0, &[("date", &old)]), 30, "apparent_age");
    assert_eq!(age(0, &[("date", &fast)]), 0);
    assert_eq!(age(0, &[("date", &fast), ("age", "20")]), 20);
    assert_eq!(age(5, &[("age", "20")]), 25, "corrected_age_value");
    assert_eq!(age(5, &[("age", "20"), ("date", &old)]), 30, "the larger of both");
    assert_eq!(age(5, &[("age", " 40 "), ("date", &old)]), 45);
    let life = case(&[("cache-control", "max-age=600"), ("age", "20")]).life();
    assert_eq!(life.age(at(NOW + 7)).as_secs(), 27, "and the time that it is here");
    assert_eq!(life.age(at(NOW - 7)).as_secs(), 20, "whatever the clock does");
}

#[test]
fn section_4_2_3_what_is_older_than_its_lifetime_is_stale() {
    let (slow, date, fast) = (text(at(NOW - 10)), text(at(NOW)), text(at(NOW + 10)));
    assert_eq!(fresh(&[("cache-control", "max-age=3600"), ("age", "7200"), ("date", &date)]), 0);
    assert_eq!(fresh(&[("expires", &fast), ("date", &slow), ("age", "25")]), 0);
    assert_eq!(fresh(&[("expires", &text(at(NOW + 20))), ("date", &fast), ("age", "15")]), 0);
    assert_eq!(fresh(&[("cache-control", "max-age=3600"), ("date", &text(at(NOW - 7200)))]), 0);
}

#[test]
fn section_5_1_an_age_that_is_not_one_number_is_too_old() {
    for ages in [
        &["abc"][..],
        &["-7200"],
        &["7200.0"],
        &["7200,0"],
        &["7200", "0"],
        &["0", "7200"],
        &["0, 0"],
        &["0", "0"],
        &["3600, 3600"],
        &["7200;foo=bar"],
        &[""],
    ] {
        let mut response = vec![("cache-control", "max-age=10000"), ETAG];
        response.extend(ages.iter().map(|age| ("age", *age)));
        assert_eq!(verdict(&case(&response).life(), 0, "max-stale"), Validate, "{ages:?}");
    }
    assert_eq!(fresh(&[("cache-control", "max-age=60"), ("age", "99999999999999999999")]), 0);
}

#[test]
fn an_open_quote_makes_it_stale() {
    let life = case(&[("cache-control", "max-age=60, x=\"y, max-age=60"), ETAG]).life();
    assert_eq!(verdict(&life, 0, ""), Validate);
}

#[test]
fn section_5_2_2_4_no_cache_is_validated_each_time() {
    for value in ["no-cache", "max-age=10000, No-CaChE", "no-cache, stale-while-revalidate=9, stale-if-error=9"] {
        let life = case(&[("cache-control", value), ETAG]).life();
        for asked in ["", "max-stale", "max-age=100, max-stale=100"] {
            assert_eq!(verdict(&life, 0, asked), Validate, "{value} {asked}");
        }
        assert!(!serves_on_error(&life, 0, "stale-if-error=60"), "{value}");
    }
    assert_eq!(case(&[("cache-control", "max-age=60, no-cache")]).why(), Why::NoCache, "nothing to validate by");
    assert_eq!(fresh(&[("cache-control", "max-age=60, no-cache=\"a\"")]), 60);
}

#[test]
fn section_4_2_4_what_is_never_served_stale() {
    for strict in ["must-revalidate", "proxy-revalidate", "s-maxage=2"] {
        let said = format!("max-age=2, {strict}, stale-if-error=60, stale-while-revalidate=60");
        let rules =
            Rules { stale_if_error: Some(secs(60)), stale_while_revalidate: Some(secs(60)), ..Rules::default() };
        let life = Case { rules, ..case(&[("cache-control", &said), ETAG]) }.life();
        assert_eq!(verdict(&life, 1, "max-stale"), Fresh, "{strict}");
        assert_eq!(verdict(&life, 2, "max-stale"), Validate, "{strict}");
        assert_eq!(verdict(&life, 2, ""), Validate, "{strict}");
        assert!(!serves_on_error(&life, 2, "stale-if-error=60"), "{strict}");
        assert!(serves_on_error(&life, 1, ""), "{strict}: not stale yet");
    }
}

#[test]
fn section_4_2_4_nothing_is_served_stale_unasked() {
    let life = case(&[("cache-control", "max-age=2"), ETAG]).life();
    assert_eq!(verdict(&life, 1, ""), Fresh);
    assert_eq!(verdict(&life, 2, ""), Validate);
    assert!(!serves_on_error(&life, 2, ""));
}

#[test]
fn section_5_2_2_8_and_10_a_shared_cache_validates_what_is_stale() {
    for said in
        ["max-age=2, proxy-revalidate", "s-maxage=2", "max-age=9, s-maxage=2", "public, max-age=2, proxy-revalidate"]
    {
        let life = case(&[("cache-control", said), ETAG]).life();
        for asked in ["", "max-stale", "max-stale=60"] {
            assert_eq!((verdict(&life, 1, asked), verdict(&life, 2, asked)), (Fresh, Validate), "{said} {asked}");
        }
    }
}

#[test]
fn section_5_3_expires_counts_only_where_no_age_is_given() {
    let (soon, late) = (text(at(NOW + 10)), text(at(NOW + 1000)));
    for age in ["max-age=60", "s-maxage=60", "max-age=1, s-maxage=60"] {
        for expires in [&*soon, &late, "0", "", "Thu, 01 Dec 1994 16:00:00"] {
            assert_eq!(fresh(&[("cache-control", age), ("expires", expires)]), 60, "{age} {expires}");
        }
    }
    for invalid in ["0", "", "-1", "Thu, 01 Dec 1994 16:00:00", "1 Dec 2094", "Thu, 01 Dec 2094 16:00:00 CET"] {
        assert_eq!(case(&[("expires", invalid), ETAG]).fresh(), 0, "{invalid}: over already");
        assert_eq!(verdict(&case(&[("expires", invalid), ETAG]).life(), 0, ""), Validate, "{invalid}");
    }
}

#[test]
fn section_5_2_1_what_a_request_wants() {
    let life = case(&[("cache-control", "max-age=100"), ETAG]).life();
    for (after, asked, expected) in [
        (0, "max-age=0", Validate),
        (50, "no-cache", Validate),
        (50, "max-age=50", Fresh),
        (51, "max-age=50", Validate),
        (51, "max-age=50, max-stale", Validate),
        (50, "min-fresh=50", Fresh),
        (51, "min-fresh=50", Validate),
        (50, "min-fresh=x", Validate),
        (100, "min-fresh=0, max-stale", Validate),
        (50, "no-store", Fresh),
        (50, "only-if-cached", Fresh),
        (100, "only-if-cached", Validate),
        (100, "max-stale", Stale),
        (100_000, "max-stale", Stale),
        (150, "max-stale=50", Stale),
        (151, "max-stale=50", Validate),
        (100, "max-stale=x", Validate),
        (120, "max-age=200", Validate),
        (120, "max-age=200, max-stale=30", Stale),
        (120, "max-age=110, max-stale=30", Validate),
    ] {
        assert_eq!(verdict(&life, after, asked), expected, "{asked} after {after}");
    }
}

#[test]
fn rfc_5861_section_3_stale_while_revalidate() {
    let life = case(&[("cache-control", "max-age=10, stale-while-revalidate=20")]).life();
    let all = [(9, "", Fresh), (10, "", Refresh), (29, "", Refresh), (30, "", Validate)];
    for (after, asked, expected) in all {
        assert_eq!(verdict(&life, after, asked), expected, "after {after}");
    }
    assert_eq!(verdict(&life, 20, "max-age=60"), Validate, "who says how old wants it fresh");
    assert_eq!(verdict(&life, 20, "max-stale=5"), Validate, "or not so stale");
    assert_eq!(verdict(&life, 20, "max-stale=10"), Refresh);
    assert_eq!(verdict(&life, 30, "max-stale"), Stale);
    let rules = Rules { stale_while_revalidate: Some(secs(5)), ..Rules::default() };
    let life = Case { rules, ..case(&[("cache-control", "max-age=10, stale-while-revalidate=20")]) }.life();
    assert_eq!((verdict(&life, 14, ""), verdict(&life, 15, "")), (Refresh, Validate), "the operator's");
}

#[test]
fn rfc_5861_section_4_stale_if_error() {
    let life = case(&[("cache-control", "max-age=10, stale-if-error=20")]).life();
    assert!(serves_on_error(&life, 29, "") && !serves_on_error(&life, 30, ""));
    assert!(serves_on_error(&life, 30, "stale-if-error=30") && !serves_on_error(&life, 40, "stale-if-error=30"));
    assert!(serves_on_error(&life, 20, "stale-if-error=1"), "the longer one");
    assert!(serves_on_error(&life, 20, "max-age=0"), "loaded again");
    assert!(!serves_on_error(&life, 5, "no-cache"));
    assert!(serves_on_error(&life, 20, "no-cache, stale-if-error=30"));
    let rules = Rules { stale_if_error: Some(secs(100)), ..Rules::default() };
    let life = Case { rules, ..case(&[("cache-control", "max-age=10")]) }.life();
    assert!(serves_on_error(&life, 109, "") && !serves_on_error(&life, 110, ""));
}

#[test]
fn a_ttl_counts_from_the_arrival_and_more_than_what_is_said() {
    let rules = Rules { ttl: Some(secs(60)), stale_if_error: Some(secs(60)), ..Rules::default() };
    for said in ["no-cache", "max-age=0, must-revalidate", "s-maxage=5", "max-age=9999", "proxy-revalidate, x=\""] {
        for age in ["0", "100", "abc"] {
            let life = Case { rules, ..case(&[("cache-control", said), ("age", age), ("expires", "0")]) }.life();
            assert_eq!(life.remaining(at(NOW)), 60, "{said}, age {age}");
            assert!(serves_on_error(&life, 119, "") && !serves_on_error(&life, 120, ""), "{said}, age {age}");
        }
    }
    for (said, why) in [("no-store", Why::NoStore), ("private", Why::Private)] {
        assert_eq!(Case { rules, ..case(&[("cache-control", said)]) }.why(), why);
    }
    for status in [302, 403, 404, 500] {
        assert_eq!(Case { rules, ..with_status(status, &[]) }.why(), Why::NoFreshness, "{status}");
    }
}

#[test]
fn all_that_is_said_can_be_ignored() {
    let rules = Rules { ttl: Some(secs(60)), ignore_cache_control: true, ..Rules::default() };
    let said = [("cache-control", "no-store, private"), ("pragma", "no-cache"), ("expires", "0")];
    assert_eq!(Case { rules, ..case(&said) }.fresh(), 60);
    let guess = Rules { ignore_cache_control: true, ..Rules::default() };
    let modified = text(at(NOW - 100));
    assert_eq!(Case { rules: guess, ..case(&[said[2], ("last-modified", &modified)]) }.fresh(), 10);
    assert_eq!(Case { rules: guess, ..case(&[("cache-control", "max-age=60")]) }.why(), Why::NoFreshness);
    let secret = Case { request: &[("authorization", "FOO")], rules, ..case(&[("cache-control", "public")]) };
    assert_eq!(secret.why(), Why::Authorization, "a permission as well");
}

#[test]
fn errors_are_never_used_longer_than_the_operator_says() {
    let long = [("cache-control", "max-age=3600, stale-if-error=60, stale-while-revalidate=60"), ETAG];
    let negative = |seconds| Rules { negative_ttl: Some(secs(seconds)), ..Rules::default() };
    for status in [429, 500, 502, 503, 504] {
        let of = |rules, response| Case { rules, ..with_status(status, response) };
        assert_eq!(of(Rules::default(), &[]).why(), Why::NoFreshness, "{status}");
        assert_eq!(of(Rules::default(), &long).fresh(), 1, "{status}");
        assert_eq!(of(negative(5), &[]).fresh(), 5, "{status}");
        assert_eq!(of(negative(5), &long).fresh(), 5, "{status}");
        assert_eq!(of(negative(60), &long).fresh(), 10, "{status}");
        assert_eq!(of(negative(0), &long).why(), Why::Stale, "{status}");
        let life = of(negative(5), &long).life();
        assert_eq!(verdict(&life, 5, "max-stale"), Validate, "{status}");
        assert_eq!(life.keep_until(), at(NOW + 5), "{status}");
    }
    for status in [400, 403, 409, 499, 505, 599] {
        assert_eq!(with_status(status, &long).fresh(), 1, "{status}");
        assert_eq!(Case { rules: negative(5), ..with_status(status, &[]) }.why(), Why::NoFreshness, "{status}");
    }
}

#[test]
fn what_is_not_there_is_remembered_by_its_own_rule() {
    let rules = Rules { negative_ttl: Some(secs(30)), ttl: Some(secs(3600)), ..Rules::default() };
    for status in [404, 405, 410, 414, 501] {
        let of = |response| Case { rules, ..with_status(status, response) };
        assert_eq!(of(&[]).fresh(), 30, "{status}");
        assert_eq!(of(&[("age", "50")]).fresh(), 30, "{status}: from its arrival");
        let said = of(&[("cache-control", "max-age=90")]).fresh();
        assert_eq!(said, if status == 501 { 30 } else { 90 }, "{status}: what it says itself");
        assert_eq!(of(&[("cache-control", "no-cache")]).why(), Why::NoCache, "{status}");
    }
    let modified = text(at(NOW - 1000));
    assert_eq!(with_status(404, &[("last-modified", &modified)]).fresh(), 100);
    assert_eq!(with_status(501, &[("last-modified", &modified)]).fresh(), 1, "an error for all that");
}

#[test]
fn it_is_kept_as_long_as_it_is_of_use() {
    let kept = |response: Fields<'_>| case(response).life().keep_until().duration_since(at(NOW)).unwrap().as_secs();
    assert_eq!(kept(&[("cache-control", "max-age=60")]), 60);
    assert_eq!(kept(&[("cache-control", "max-age=60"), ("age", "20")]), 40);
    assert_eq!(kept(&[("cache-control", "max-age=60, stale-if-error=30, stale-while-revalidate=9")]), 90);
    assert_eq!(kept(&[("cache-control", "max-age=60"), ETAG]), 60 + 3600, "at least an hour to be validated");
    assert_eq!(kept(&[("cache-control", "max-age=7200"), ETAG]), 14_400);
    assert_eq!(kept(&[("cache-control", "max-age=864000"), ETAG]), 864_000 + 86_400, "at most a day");
    assert_eq!(kept(&[("cache-control", "no-cache"), ETAG]), 3600);
}

#[test]
fn a_soft_purge_makes_it_stale_from_now_on() {
    let mut life = case(&[("cache-control", "max-age=100, stale-while-revalidate=20")]).life();
    life.expire(at(NOW + 50));
    assert_eq!(verdict(&life, 50, ""), Refresh);
    assert_eq!((verdict(&life, 69, ""), verdict(&life, 70, "")), (Refresh, Validate));
    assert_eq!(life.keep_until(), at(NOW + 70));
    let before = life;
    life.expire(at(NOW + 90));
    assert_eq!(life, before, "it was stale already");
}

#[test]
fn what_remains_is_rounded_down() {
    let life = case(&[("cache-control", "max-age=10")]).life();
    let remaining = |millis| life.remaining(at(NOW) + Duration::from_millis(millis));
    assert_eq!([0, 1, 9999, 10_000, 10_001, 11_000].map(remaining), [10, 9, 0, 0, -1, -1]);
}

#[test]
fn no_clock_is_too_wrong() {
    let far = UNIX_EPOCH + secs(86_400 * 366 * 20_000);
    let early = UNIX_EPOCH - secs(1 << 40);
    let (request, ()) = Request::new(()).into_parts();
    let (mut response, ()) = Response::new(()).into_parts();
    response.headers = map(&[("cache-control", "max-age=4294967296"), ("age", "7"), ETAG]);
    let rules = Rules { stale_if_error: Some(Duration::MAX), ..Rules::default() };
    for times in [(far, early), (early, far), (early, early), (far, far)] {
        let life = life(&request, &response, &rules, times.0, times.1).unwrap();
        for now in [early, at(NOW), far] {
            assert!(life.age(now) >= secs(7));
            assert!(life.keep_until() >= UNIX_EPOCH);
            life.remaining(now);
        }
        assert_eq!(Life::decode(&life.encode()), Some(life));
    }
    let endless = Rules { ttl: Some(Duration::MAX), ..Rules::default() };
    assert_eq!(Case { rules: endless, ..case(&[("age", "2147483648")]) }.fresh(), 1 << 31);
}

#[test]
fn section_4_2_3_the_time_that_an_answer_was_elsewhere_counts() {
    // Its writer came 10 s ago, by a clock of its own; the store's is an hour ahead of it, the reader's a day behind.
    let life = case(&[("cache-control", "max-age=60"), ("age", "5")]).life();
    let (writer, store, reader) = ((NOW + 10) * 1000, (NOW + 3610) * 1000, (NOW - 86_400) * 1000);
    let in_store = life.by(writer, store).unwrap();
    let read = in_store.by(store + 20_000, reader).unwrap();
    let now = UNIX_EPOCH + Duration::from_millis(reader);
    assert_eq!((read.age(now), read.remaining(now)), (secs(35), 25));
    assert_eq!(read.keep_until(), now + secs(25));
    assert_eq!(life.by(writer, writer), Some(life));
    let first = life.by(NOW * 1000 - 1000, store).unwrap();
    assert_eq!(first.age(UNIX_EPOCH + Duration::from_millis(store)), secs(5), "a clock that was put right");
    assert_eq!(life.by(NOW * 1000 - 1001, store), None, "nobody knows how old it is");
    assert_eq!(life.by(writer, 9999), None);
}

#[test]
fn what_was_not_encoded_is_not_decoded() {
    let bytes = case(&[("cache-control", "max-age=60"), ETAG]).life().encode();
    for length in 0..bytes.len() {
        assert_eq!(Life::decode(&bytes[..length]), None);
    }
    assert_eq!(Life::decode(&[&bytes[..], &[0]].concat()), None);
    for (position, value) in [(0, 0), (0, 1), (0, 3), (1, 4), (1, 255), (2, 1), (10, 1), (18, 1), (26, 1), (34, 128)] {
        let mut broken = bytes;
        broken[position] = value;
        assert_eq!(Life::decode(&broken), None, "{position}");
    }
}

fn any_response() -> impl Strategy<Value = Vec<(&'static str, String)>> {
    let control = "(max-age=[0-9]{1,4}|s-maxage=[0-9]{1,3}|no-cache|public|must-revalidate|stale-if-error=[0-9]{1,3}|\
        stale-while-revalidate=[0-9]{1,3}|no-store|private=\"a\"|x=\"(, ?)?){0,3}";
    let dates = prop_oneof![(NOW - 5000..NOW + 5000).prop_map(|time| text(at(time))), "[0-9]{0,2}"];
    let field = prop_oneof![
        control.prop_map(|value| ("cache-control", value)),
        dates.clone().prop_map(|value| ("expires", value)),
        dates.clone().prop_map(|value| ("date", value)),
        dates.prop_map(|value| ("last-modified", value)),
        "[0-9]{1,5}|-1|a".prop_map(|value| ("age", value)),
        Just(("etag", "\"a\"".to_owned())),
    ];
    proptest::collection::vec(field, 0..6)
}

fn any_rules() -> impl Strategy<Value = Rules> {
    let time = || proptest::option::of((0_u64..5000).prop_map(Duration::from_millis));
    (time(), time(), time(), time(), any::<bool>(), any::<bool>()).prop_map(
        |(ttl, negative_ttl, stale_while_revalidate, stale_if_error, ignore_cache_control, keyed_by_credential)| {
            Rules {
                ttl,
                negative_ttl,
                stale_while_revalidate,
                stale_if_error,
                ignore_cache_control,
                keyed_by_credential,
            }
        },
    )
}

proptest! {
    #[test]
    fn time_makes_nothing_better(
        response in any_response(),
        rules in any_rules(),
        status in prop_oneof![Just(200_u16), Just(404), Just(503), 100_u16..1000],
        delay in 0_u64..10,
        asked in "((max-age|min-fresh|max-stale|stale-if-error)=[0-9]{1,4}|max-stale|no-cache|only-if-cached)?(, max-stale)?",
        mut times in proptest::collection::vec(0_u64..20_000, 2..8),
    ) {
        let fields: Vec<_> = response.iter().map(|(name, value)| (*name, &**value)).collect();
        let decided = Case { status, rules, ..case(&fields) }.after(delay);
        let Ok(life) = decided else { return Ok(()) };
        prop_assert_eq!(Life::decode(&life.encode()), Some(life));
        prop_assert!(life.age(at(NOW)) >= secs(delay));
        prop_assert!(life.keep_until() > at(NOW), "it is of use");
        times.sort_unstable();
        let asked = directives::Request::of(&map(&[("cache-control", &asked)]));
        for pair in times.windows(2) {
            let (now, then) = (at(NOW + pair[0]), at(NOW + pair[1]));
            prop_assert!(life.age(now) <= life.age(then));
            prop_assert!(life.remaining(now) >= life.remaining(then));
            prop_assert!(life.verdict(&asked, now) <= life.verdict(&asked, then));
            prop_assert!(life.is_stale_if_error(&asked, now) || !life.is_stale_if_error(&asked, then));
            let unasked = directives::Request::default();
            if then >= life.keep_until() {
                prop_assert_eq!(life.verdict(&unasked, then), Validate, "of no more use");
                prop_assert!(!life.is_stale_if_error(&unasked, then));
            }
            let mut purged = life;
            purged.expire(now);
            prop_assert!(purged.verdict(&unasked, then) > Fresh);
            prop_assert!(purged.verdict(&unasked, now) >= life.verdict(&unasked, now));
        }
    }

    #[test]
    fn any_bytes_are_a_life_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        if let Some(life) = Life::decode(&bytes) {
            prop_assert_eq!(&life.encode()[..], &bytes[..]);
            life.keep_until();
        }
    }
}
