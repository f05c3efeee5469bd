use std::fmt::Write;

use proptest::prelude::*;
use ring::digest::SHA256;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

use super::{sink::Short, tape::MAX_DEPTH, *};
use crate::config::{Check, Problems};

fn hash_by(text: &[u8], rules: &Body) -> Result<Vec<u8>, Why> {
    let mut context = Context::new(&SHA256);
    digest(text, rules, &mut context).map(|_| context.finish().as_ref().to_vec())
}

fn hash(text: &str) -> Result<Vec<u8>, Why> {
    hash_by(text.as_bytes(), &Body { tools: true, ..Body::default() })
}

fn written(text: &str) -> Vec<u8> {
    let mut to = Short { bytes: Vec::new(), longest: usize::MAX };
    Tape::read(text.as_bytes()).unwrap().write(0, &[], &mut to);
    to.bytes
}

fn rules(rules: &Value) -> Body {
    serde_json::from_value(rules.clone()).unwrap()
}

fn same(texts: &[&str]) {
    for text in texts {
        assert_eq!(hash(text).unwrap(), hash(texts[0]).unwrap(), "{text} {}", texts[0]);
    }
}

fn all_differ(texts: &[&str]) {
    for (n, text) in texts.iter().enumerate() {
        for other in &texts[..n] {
            assert_ne!(hash(text).unwrap(), hash(other).unwrap(), "{text} {other}");
            assert!(!written(text).starts_with(&written(other)), "{text} {other}");
        }
    }
}

#[test]
fn hashes_of_an_older_version_are_found_again() {
    // Whoever changes this empties every cache: then the version of the keys' domain has to change, too.
    let text = r#"{"b":[1.50,-2e3,true,null],"a":{"c":"\u00e9\n"}}"#;
    let hex: Vec<_> = hash(text).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex.concat(), "31e0e9ff4de9a281d480e53ed4a93903bf113c8efdc11381a362f6aa865d9a49");
}

#[test]
fn order_and_white_space_do_not_matter() {
    same(&[r#"{"a":1,"b":{"c":[1,2],"d":null}}"#, "\t{ \"b\" : {\r\n\"d\":null ,\"c\": [ 1 , 2 ] } , \"a\" :1 }\n"]);
    same(&["[]", " [ ] "]);
    same(&["{}", "{ }\n"]);
}

#[test]
fn strings_are_what_they_mean() {
    same(&[r#"{"A/é":"\n\"\\\b\f\r\t"}"#, r#"{"\u0041\/\u00e9":"\u000a\u0022\u005C\u0008\u000c\u000D\u0009"}"#]);
    same(&["\"\u{1F600}\"", r#""\ud83d\uDE00""#]);
    same(&[r#"{"ab":1,"b":2}"#, r#"{"b":2,"\u0061b":1}"#]);
    all_differ(&[r#""e\u0301""#, r#""\u00e9""#, r#""""#, r#""\u0000""#, r#""\u0000\u0000""#]);
    all_differ(&["\"\\u0041\"", "\"\\\\u0041\""]);
}

#[test]
fn numbers_are_what_they_are_worth_and_nothing_is_rounded() {
    same(&["1", "1.0", "1e0", "1E+0", "10e-1", "0.1e1", "0.0010e3", "1.000", "100e-02"]);
    same(&["120", "1.2e2", "12e1", "1200E-1", "120.0"]);
    same(&["0", "0.0", "0e9", "0.00E-3"]);
    same(&["-0.25", "-25e-2", "-2.50e-1"]);
    all_differ(&["9007199254740992", "9007199254740993", "18446744073709551615", "18446744073709551616"]);
    all_differ(&["0.1", "0.10000000000000001", "0.1000000000000000055511151231257827", "-0.1", "0", "-0", "1e-1000"]);
    all_differ(&["1", "10", "0.01", "11", "101", "1.1", "1.01", "1e400", "1e401", "-1", "\"1\"", "[1]"]);
    let far = ["1e999999999999999999", "1e9999999999999999999", "1e-9999999999999999999", "1e99999999999999999990"];
    all_differ(&far);
}

#[test]
fn the_structure_cannot_be_taken_for_another() {
    all_differ(&[
        r#"["ab"]"#,
        r#"["a","b"]"#,
        r#"["b","a"]"#,
        r#"[["a"],"b"]"#,
        r#"["a",["b"]]"#,
        r#"[["a","b"]]"#,
        r#"{"a":"b"}"#,
        r#"{"b":"a"}"#,
        r#"{"ab":""}"#,
        r#"{"a":{"b":{}}}"#,
        r#"{"a":{},"b":{}}"#,
        r#"[{"a":"b"}]"#,
        r#""[\"ab\"]""#,
    ]);
    all_differ(&["[]", "{}", "[[]]", "[{}]", "[[],[]]", "null", "false", "true", "0", r#""""#, r#""null""#, "[null]"]);
    all_differ(&["{}", r#"{"a":null}"#, r#"{"a":[]}"#, r#"{"a":{}}"#, r#"{"":null}"#, r#"{"a":null,"b":null}"#]);
    all_differ(&[r#"{"stream":true}"#, r#"{"stream":false}"#, "{}"]);
}

#[test]
fn what_readers_take_differently_has_no_hash() {
    for text in
        [r#"{"a":1,"a":1}"#, r#"{"a":1,"b":0,"\u0061":2}"#, r#"[{"x":{"a":1,"c":2,"b":3,"a":{}}}]"#, r#"{"":1,"":2}"#]
    {
        assert_eq!(hash(text), Err(Why::DuplicateMember), "{text}");
    }
    assert!(hash(r#"{"a":{"a":1},"b":{"a":1}}"#).is_ok(), "in another object it is another one");
    for text in [r#""\ud800""#, r#""\udc00""#, r#""\ud800\ud800""#, r#""\ud800x""#, r#"{"\uDFFF":1}"#, r#""\ud83d\n""#]
    {
        assert_eq!(hash(text), Err(Why::LoneSurrogate), "{text}");
    }
}

#[test]
fn what_is_no_json_has_no_hash() {
    let texts = [
        "",
        " ",
        "\u{feff}{}",
        "{",
        "[1,]",
        "[,1]",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{a:1}",
        "{1:1}",
        "1 2",
        "01",
        "1.",
        ".5",
        "-",
        "+1",
        "1e",
        "1e+",
        "0x1",
        "NaN",
        "Infinity",
        "nul",
        "nullx",
        "truefalse",
        "'a'",
        "\"a",
        "\"\u{1}\"",
        "\"\\x\"",
        "\"\\u12\"",
        "\"\\u12g4\"",
        "\"\\ud800\\u12\"",
        "[1}",
        "{}]",
        "]",
        "/**/{}",
        "\u{a0}1",
    ];
    for text in texts {
        assert_eq!(hash(text), Err(Why::NotJson), "{text:?}");
    }
    assert_eq!(hash_by(b"\"\xff\"", &Body::default()), Err(Why::NotJson));
    assert_eq!(hash_by(b"\"\xed\xa0\x80\"", &Body::default()), Err(Why::NotJson), "a surrogate in UTF-8");
}

#[test]
fn depth_has_a_bound() {
    let nested = |depth: usize, open: &str, close: &str| [open.repeat(depth), "1".into(), close.repeat(depth)].concat();
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        assert!(hash(&nested(MAX_DEPTH, open, close)).is_ok());
        assert_eq!(hash(&nested(MAX_DEPTH + 1, open, close)), Err(Why::TooDeep));
        assert_eq!(hash(&open.repeat(1_000_000)), Err(Why::TooDeep));
    }
}

#[test]
fn what_is_ignored_makes_no_difference() {
    let rules = rules(&json!({"ignore": ["user", "metadata.trace_id", "/x/a.b", "/ab/~1~0/"]}));
    let hash = |text: &str| hash_by(text.as_bytes(), &rules).unwrap();
    let plain = hash(r#"{"m":1,"metadata":{"k":1},"x":{},"ab":{"/~":{}}}"#);
    let full = r#"{"user":{"id":[7]},"m":1,"metadata":{"trace_id":"t","k":1},"x":{"a.b":2},"ab":{"/~":{"":0}}}"#;
    assert_eq!(hash(full), plain);
    assert_eq!(hash(&full.replace("user", "us\\u0065r")), plain);
    assert_ne!(hash(&full.replace("user", "users")), plain);
    assert_ne!(hash(r#"{"m":1}"#), plain, "an empty object is not none");
    assert_ne!(hash(r#"{"m":{"user":1}}"#), hash(r#"{"m":{}}"#), "only where the path says");
    assert_ne!(hash(r#"[{"user":1}]"#), hash("[{}]"), "paths do not lead into arrays");
    assert_eq!(hash_by(br#"{"user":1,"user":1}"#, &rules), Err(Why::DuplicateMember));
}

#[test]
fn a_condition_is_about_values_and_null_is_also_absence() {
    let is = |when: Value, text: &str| hash_by(text.as_bytes(), &rules(&json!({ "when": when }))).map(drop);
    let zero = || json!({"temperature": [0, null]});
    for text in [r#"{"temperature":0}"#, r#"{"temperature":0.0}"#, r#"{"temperature":null}"#, "{}", "[]", "3"] {
        assert_eq!(is(zero(), text), Ok(()), "{text}");
    }
    for text in
        [r#"{"temperature":0.1}"#, r#"{"temperature":"0"}"#, r#"{"temperature":false}"#, r#"{"temperature":[]}"#]
    {
        assert_eq!(is(zero(), text), Err(Why::Condition), "{text}");
    }
    assert_eq!(is(json!({"temperature": 0.7}), r#"{"temperature":7e-1}"#), Ok(()));
    assert_eq!(is(json!({"temperature": 0.7}), "{}"), Err(Why::Condition), "absent is not one of them");
    assert_eq!(is(json!({"a.b": "x"}), r#"{"a":{"b":"\u0078"}}"#), Ok(()));
    assert_eq!(is(json!({"a.b": "x"}), r#"{"a":{"b":"xx"}}"#), Err(Why::Condition));
    assert_eq!(is(json!({"a.b": "x"}), r#"{"a":"x"}"#), Err(Why::Condition));
    assert_eq!(is(json!({"a": [{"b": 1, "c": [2]}]}), r#"{"a":{"c":[2.0],"b":1}}"#), Ok(()));
    assert_eq!(is(json!({"a": 1, "b": 2}), r#"{"a":1}"#), Err(Why::Condition), "all of them");
    assert_eq!(is(json!({"a": []}), "{}"), Err(Why::Condition));
}

#[test]
fn an_answer_passes_by_its_members() {
    let when: When = serde_json::from_value(json!({"job.status": ["completed", "failed"]})).unwrap();
    assert_eq!(when.pass(br#"{"job":{"status":"failed"}}"#), Ok(()));
    assert_eq!(when.pass(br#"{"job":{"status":"running"}}"#), Err(Why::Condition));
    assert_eq!(when.pass(b"<html>"), Err(Why::NotJson));
}

#[test]
fn tools_are_not_cached_unless_the_rules_say_so() {
    let asks = |text: &str| hash_by(text.as_bytes(), &Body::default()) == Err(Why::Tools);
    for text in [
        r#"{"tools":[{"type":"function"}]}"#,
        r#"{"functions":[1]}"#,
        r#"{"t":1,"\u0074ools":["x"]}"#,
        r#"{"tools":{}}"#,
        r#"{"mcp_servers":[{}]}"#,
        r#"{"web_search_options":{}}"#,
    ] {
        assert!(asks(text), "{text}");
        assert!(hash(text).is_ok(), "{text}");
    }
    for text in [r#"{"tools":[]}"#, r#"{"tools":null}"#, r#"{"a":{"tools":[1]}}"#, r#"["tools"]"#, "{}"] {
        assert!(!asks(text), "{text}");
    }
}

#[test]
fn whether_a_stream_is_asked_for_is_told() {
    let stream = |text: &str| digest(text.as_bytes(), &Body::default(), &mut Context::new(&SHA256)).unwrap().stream;
    assert_eq!(stream(r#"{"model":"m","stream":true}"#), Some(true));
    assert_eq!(stream(r#"{"stream":false}"#), Some(false));
    for text in [r#"{"stream":"true"}"#, "{}", "[true]", r#"{"x":{"stream":true}}"#, r#"{"stream":null}"#] {
        assert_eq!(stream(text), None, "{text}");
    }
}

#[test]
fn nothing_is_added_of_a_body_that_has_no_hash() {
    let mut context = Context::new(&SHA256);
    for text in [r#"{"a":1,"a":2}"#, r#"{"tools":[1]}"#, "[1", ""] {
        assert!(digest(text.as_bytes(), &Body::default(), &mut context).is_err());
    }
    assert_eq!(context.finish().as_ref(), Context::new(&SHA256).finish().as_ref());
}

#[test]
fn a_path_is_written_with_dots_or_as_a_pointer() {
    let names = |text: &str| text.parse::<Path>().map(|path| path.0);
    assert_eq!(names("metadata.trace_id").unwrap(), ["metadata", "trace_id"]);
    assert_eq!(names("/metadata/trace_id").unwrap(), ["metadata", "trace_id"]);
    assert_eq!(names("/a.b/~0~1/~01").unwrap(), ["a.b", "~/", "~1"]);
    assert_eq!(names("/").unwrap(), [""]);
    for text in ["", "a.", ".a", "a..b", "/a~", "/a~2b"] {
        assert!(names(text).is_err(), "{text}");
    }
    for text in ["a", "a.b", "/a.b/c", "/", "/a//b", "a/b.c", "/~1a", "~"] {
        let path: Path = text.parse().unwrap();
        assert_eq!(path.to_string(), text);
    }
}

#[test]
fn rules_without_effect_are_mistakes() {
    let problems = |body: &Value| {
        let mut problems = Problems::default();
        rules(body).check(&mut problems);
        problems.to_string()
    };
    assert_eq!(problems(&json!({"ignore": ["user", "a.b"], "when": {"temperature": [0, null]}, "tools": true})), "");
    assert_eq!(problems(&json!({"ignore": ["a", "/a"]})), "ignore: holds `a` twice");
    assert_eq!(problems(&json!({"ignore": ["a.b", "a"]})), "ignore: holds `a.b`, which `a` leaves out already");
    assert!(problems(&json!({"ignore": ["stream"]})).starts_with("ignore: holds `stream`"));
    assert!(problems(&json!({"when": {"a": []}})).starts_with("when.a: is an empty list"));
    let round = json!({"ignore": ["user"], "when": {"n": [1, null]}, "tools": false});
    assert_eq!(serde_json::to_value(rules(&round)).unwrap(), round);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3..12).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-9..9).prop_map(|number| Value::from(f64::from(number) + 0.5)),
        "[ab\"\\\\/\n\u{e9}\u{1F600}]{0,4}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map("[a-c\n]{0,2}", inner, 0..5).prop_map(Value::from_iter),
        ]
    })
}

/// Writes a value in another way for each sequence of `choices`.
fn spell(value: &Value, choices: &mut impl Iterator<Item = u8>, out: &mut String) {
    let space = |choices: &mut dyn Iterator<Item = u8>, out: &mut String| {
        out.push_str(["", "", " ", "\n\t"][usize::from(choices.next().unwrap() % 4)]);
    };
    let string = |text: &str, choices: &mut dyn Iterator<Item = u8>, out: &mut String| {
        out.push('"');
        for char in text.chars() {
            if choices.next().unwrap().is_multiple_of(2) || char < ' ' || char == '"' || char == '\\' {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").unwrap();
                }
            } else {
                out.push(char);
            }
        }
        out.push('"');
    };
    space(choices, out);
    match value {
        Value::String(text) => string(text, choices, out),
        Value::Number(number) => {
            let text = number.to_string();
            let spelled = match (choices.next().unwrap() % 4, text.contains('.')) {
                (0, false) => format!("{text}.00"),
                (0, true) => format!("{text}0"),
                (1, _) => format!("{text}e0"),
                (2, false) if text != "0" => format!("{text}00E-2"),
                _ => text,
            };
            out.push_str(&spelled);
        }
        Value::Array(values) => {
            out.push('[');
            for (n, value) in values.iter().enumerate() {
                *out += if n > 0 { "," } else { "" };
                spell(value, choices, out);
            }
            space(choices, out);
            out.push(']');
        }
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            if !members.is_empty() {
                let by = usize::from(choices.next().unwrap()) % members.len();
                members.rotate_left(by);
            }
            out.push('{');
            for (n, (name, value)) in members.into_iter().enumerate() {
                *out += if n > 0 { "," } else { "" };
                space(choices, out);
                string(name, choices, out);
                space(choices, out);
                out.push(':');
                spell(value, choices, out);
            }
            space(choices, out);
            out.push('}');
        }
        literal => *out += &literal.to_string(),
    }
    space(choices, out);
}

/// The number times 10^9, and whether it has a minus.
fn worth(text: &str) -> (i128, bool) {
    let (digits, power) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let power = power.parse::<i32>().unwrap() - i32::try_from(fraction.len()).unwrap() + 9;
    let digits: i128 = format!("{whole}{fraction}").parse().unwrap();
    (digits * 10_i128.pow(u32::try_from(power).unwrap()), text.starts_with('-'))
}

proptest! {
    #[test]
    fn every_spelling_has_the_same_hash(value in any_json(), choices in prop::collection::vec(any::<u8>(), 1..40)) {
        let mut text = String::new();
        spell(&value, &mut choices.iter().copied().cycle(), &mut text);
        prop_assert_eq!(hash(&text), hash(&value.to_string()), "{}", text);
    }

    #[test]
    fn what_differs_has_another_hash(one in any_json(), other in any_json()) {
        let (text, another) = (one.to_string(), other.to_string());
        prop_assert_eq!(hash(&text) == hash(&another), one == other);
        prop_assert_eq!(written(&text).starts_with(&written(&another)), one == other);
    }

    #[test]
    fn a_changed_member_makes_a_difference(value in any_json(), other in any_json(), at: prop::sample::Index) {
        let mut changed = value.clone();
        if let Some(members) = changed.as_object_mut().filter(|members| !members.is_empty()) {
            let at = at.index(members.len());
            *members.values_mut().nth(at).unwrap() = other;
        }
        prop_assert_eq!(hash(&value.to_string()) == hash(&changed.to_string()), value == changed);
    }

    #[test]
    fn numbers_are_the_same_only_if_they_are_worth_the_same(
        one in "-?(0|[1-9][0-9]{0,2})(\\.[0-9]{1,3})?([eE][+-]?0?[0-4])?",
        other in "-?(0|[1-9]0{0,2})(\\.[0-9]{1,3})?([eE][+-]?0?[0-4])?",
    ) {
        prop_assert_eq!(hash(&one) == hash(&other), worth(&one) == worth(&other), "{} {}", one, other);
        let zero = worth(&other).0 == 0;
        prop_assert_eq!(hash(&other) == hash("0"), zero && !other.starts_with('-'));
    }

    #[test]
    fn it_accepts_what_serde_json_accepts(
        value in any_json(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(&b"\"\\{}[]:,0-.eE+tn u\n\0x\xFF"[..])), 0..3),
    ) {
        let mut text = value.to_string().into_bytes();
        for (index, byte) in changes {
            let index = index.index(text.len());
            text[index] = byte;
        }
        accepts_the_same(&text)?;
    }

    #[test]
    fn it_accepts_what_serde_json_accepts_of_pieces(
        pieces in prop::collection::vec(
            prop::sample::select(vec!["{", "}", "[", "]", ",", ":", "\"\"", "\"a\"", "\"\\u12aF\"", "\\", "\"\\ud800\"", "1", "0", "-", ".", "e", "+", "null", "true", "false", "t", " "]),
            0..12,
        ),
    ) {
        accepts_the_same(pieces.concat().as_bytes())?;
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        drop(hash_by(&bytes, &rules(&json!({"ignore": ["a.b"], "when": {"a": 1}}))));
    }
}

fn accepts_the_same(text: &[u8]) -> Result<(), TestCaseError> {
    let is_json = serde_json::from_slice::<IgnoredAny>(text).is_ok() && std::str::from_utf8(text).is_ok();
    match Tape::read(text) {
        Ok(_) => prop_assert!(is_json, "{}", text.escape_ascii()),
        Err(Why::NotJson) => prop_assert!(!is_json, "{}", text.escape_ascii()),
        Err(_) => {}
    }
    Ok(())
}
