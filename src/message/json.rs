//! JSON bodies of requests, rewritten: members changed, and all others left byte for byte: numbers of any size, the order,
//! and what a reader of its own would make of it.

use std::fmt;

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, TRAILER},
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value, value::RawValue};

/// What is true of a body as it was (RFC 9530, and what came before it).
const DIGESTS: [HeaderName; 4] = [
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("repr-digest"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("content-md5"),
];

/// Whether a body with these headers is JSON that can be read as it is.
#[must_use]
pub fn is_json(headers: &HeaderMap) -> bool {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    (essence == "application/json" || essence.ends_with("+json")) && !headers.contains_key(CONTENT_ENCODING)
}

/// Makes the headers of a request those of another body, of `length` bytes and without trailers.
pub fn replaced(headers: &mut HeaderMap, length: usize) {
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    for stale in [EXPECT, TRAILER].into_iter().chain(DIGESTS) {
        headers.remove(stale);
    }
}

/// `text` with `patch` applied as a JSON Merge Patch (RFC 7396): sections merge, `null` removes, anything else takes the
/// place of what was there. `None` where the text is no JSON object.
///
/// Of a member that stands twice, which readers take differently, and that the patch names, the last one is left.
#[must_use]
pub fn merge(text: &[u8], patch: &Map<String, Value>) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() + 64);
    let object = serde_json::from_slice(text).ok()?;
    object_into(&mut out, &object, patch).then_some(out)
}

/// The members of an object, in their order, with their text.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        from.deserialize_map(Object)
    }
}

/// Writes the object with its changes. Goes as deep as the patch, which is the operator's. `false` where something could
/// not be written.
fn object_into(out: &mut Vec<u8>, Members(members): &Members<'_>, patch: &Map<String, Value>) -> bool {
    let mut whole = true;
    let mut before = b'{';
    let mut key = |out: &mut Vec<u8>, key: &str| {
        out.push(std::mem::replace(&mut before, b','));
        let written = serde_json::to_writer(&mut *out, key).is_ok();
        out.push(b':');
        written
    };
    for (n, (name, old)) in members.iter().enumerate() {
        let Some(new) = patch.get(name) else {
            whole &= key(out, name);
            out.extend_from_slice(old.get().as_bytes());
            continue;
        };
        let is_last = members.iter().rposition(|(other, _)| other == name) == Some(n);
        if is_last && !new.is_null() {
            whole &= key(out, name) && value_into(out, Some(old), new);
        }
    }
    for (name, new) in patch {
        if !new.is_null() && members.iter().all(|(other, _)| other != name) {
            whole &= key(out, name) && value_into(out, None, new);
        }
    }
    if before == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    whole
}

fn value_into(out: &mut Vec<u8>, old: Option<&RawValue>, new: &Value) -> bool {
    match new {
        Value::Object(patch) => {
            let old = old.and_then(|old| serde_json::from_str(old.get()).ok());
            object_into(out, &old.unwrap_or(Members(Vec::new())), patch)
        }
        other => serde_json::to_writer(out, other).is_ok(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_map, prelude::*};
    use serde_json::json;

    use super::*;

    fn merged(text: &str, patch: &Value) -> Option<String> {
        merge(text.as_bytes(), patch.as_object().unwrap()).map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn what_is_not_named_stays_as_it_was_written() {
        let text =
            r#" {"seed": 12345678901234567890123, "model":"gpt-4o" ,"messages":[ {"a" : 1.0e3} ], "z":"\u00e9"}"#;
        let expected = r#"{"seed":12345678901234567890123,"model":"llama3","messages":[ {"a" : 1.0e3} ],"z":"\u00e9"}"#;
        assert_eq!(merged(text, &json!({"model": "llama3"})).as_deref(), Some(expected));
    }

    #[test]
    fn sections_merge_and_null_removes() {
        let text = r#"{"a":{"b":1,"c":2},"user":"me","n":1}"#;
        let patch =
            json!({"a": {"b": null, "d": [3, null]}, "user": null, "n": {"x": 1, "y": null}, "new": {"z": null}});
        assert_eq!(merged(text, &patch).as_deref(), Some(r#"{"a":{"c":2,"d":[3,null]},"n":{"x":1},"new":{}}"#));
        assert_eq!(merged(r#"{"a":1}"#, &json!({"a": null})).as_deref(), Some("{}"));
        assert_eq!(merged("{}", &json!({"a": 1})).as_deref(), Some(r#"{"a":1}"#));
    }

    #[test]
    fn nobody_is_left_a_second_one_to_believe() {
        let text = r#"{"model":"a","x":1,"mod\u0065l":"b","x":2}"#;
        assert_eq!(merged(text, &json!({"model": "c"})).as_deref(), Some(r#"{"x":1,"model":"c","x":2}"#));
    }

    #[test]
    fn what_is_no_object_is_not_changed() {
        for text in ["", "[]", "1", "null", "{", "{\"a\":1}x", "{\"a\":\u{1}}", r#"{"a":01}"#, "\u{feff}{}"] {
            assert_eq!(merged(text, &json!({"a": 1})), None, "{text}");
        }
        assert_eq!(merge(b"{\"a\":\"\xff\"}", &Map::new()), None);
        // As deep as it likes: it is not read, only passed over.
        let deep = format!(r#"{{"deep":{}{},"a":1}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(merged(&deep, &json!({"a": 2})), Some(deep.replace("\"a\":1", "\"a\":2")));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[ab\"\\\\é]{0,3}".prop_map(Value::from)
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                btree_map("[a-d]", inner, 0..4).prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn any_object() -> impl Strategy<Value = Map<String, Value>> {
        btree_map("[a-d]", any_json(), 0..5).prop_map(|map| map.into_iter().collect())
    }

    /// RFC 7396 §2, word for word.
    fn merge_patch(target: Value, patch: &Value) -> Value {
        let Value::Object(patch) = patch else { return patch.clone() };
        let mut target = if let Value::Object(target) = target { target } else { Map::new() };
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                let old = target.remove(name).unwrap_or(Value::Null);
                target.insert(name.clone(), merge_patch(old, value));
            }
        }
        Value::Object(target)
    }

    proptest! {
        #[test]
        fn it_is_the_patch_of_the_rfc(target in any_object(), patch in any_object()) {
            let text = Value::Object(target.clone()).to_string();
            let merged: Value = serde_json::from_slice(&merge(text.as_bytes(), &patch).unwrap()).unwrap();
            prop_assert_eq!(merged, merge_patch(Value::Object(target), &Value::Object(patch)));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..50), patch in any_object()) {
            drop(merge(&bytes, &patch));
        }
    }
}
