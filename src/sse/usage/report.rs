//! What a JSON text says about usage, and whether it is content.

use super::{
    super::{
        bytes::Short,
        json::{Json, Token},
    },
    Usage,
};

/// Reads one text after another: the data of events, lines, or one whole body. All that it asks for stands in the first
/// three levels of an object, so it keeps the last key of each.
#[derive(Debug, Clone)]
pub(super) struct Report {
    counts: Counts,
    json: Json,
    /// How the text begins, without white space: as much as tells `[DONE]` from others.
    head: Short<8>,
    /// Which member of the outermost object is read.
    member: Member,
    /// Whether in that member, an envelope, `usage` is read.
    in_usage: bool,
    /// The count which a number means at this depth.
    count: Option<(u8, Count)>,
    says: Says,
}

/// What has been reported; all texts together.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    prompt: Option<u64>,
    input: Option<u64>,
    cache_creation: Option<u64>,
    cache_read: Option<u64>,
    output: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Count {
    /// All of the input.
    Prompt,
    /// The input, beside which Anthropic counts what has to do with its cache.
    Input,
    CacheCreation,
    CacheRead,
    Output,
}

/// The members of the outermost object that say something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    Usage,
    /// Which may have a member `usage`.
    Envelope,
    Choices,
    Type,
    Done,
    Error,
    Other,
}

/// What one text says. Where a key comes twice, what speaks against a mere report stands: it must not depend on frames
/// what has been asked when.
#[derive(Debug, Clone, Copy, Default)]
struct Says {
    choices: Choices,
    /// `usage` is there, and whether it is an object.
    usage: Option<bool>,
    /// There is an error.
    error: bool,
    /// It is by its own account no content.
    aside: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Choices {
    #[default]
    Unseen,
    Empty,
    Some,
    NoArray,
}

impl Report {
    pub(super) fn new() -> Self {
        Self {
            counts: Counts::default(),
            json: Json::new(),
            head: Short::new(),
            member: Member::Other,
            in_usage: false,
            count: None,
            says: Says::default(),
        }
    }

    /// Begins the next text.
    pub(super) fn clear(&mut self) {
        self.json.clear();
        self.head.clear();
        (self.member, self.in_usage, self.count) = (Member::Other, false, None);
        self.says = Says::default();
    }

    /// Reads on in the text.
    pub(super) fn pass(&mut self, bytes: &[u8]) {
        self.read(bytes, |_| true);
    }

    /// Reads on in the text while it can become one that only reports usage; returns whether it still can.
    pub(super) fn pass_report(&mut self, bytes: &[u8]) -> bool {
        self.read(bytes, Self::can_only_report);
        self.can_only_report()
    }

    fn read(&mut self, mut bytes: &[u8], go_on: impl Fn(&Self) -> bool) {
        if self.head.first().is_none() {
            bytes = bytes.trim_ascii_start();
        }
        self.head.extend(bytes);
        while go_on(self)
            && let Some(token) = self.json.next(&mut bytes)
        {
            match token {
                Token::Key => self.key(),
                _ => self.value(token),
            }
        }
    }

    /// What all texts together have reported.
    pub(super) fn usage(&self) -> Option<Usage> {
        let Counts { prompt, input, cache_creation, cache_read, output } = self.counts;
        let parts = [input, cache_creation, cache_read];
        let sum = || parts.into_iter().flatten().reduce(u64::saturating_add);
        let input = prompt.or_else(sum);
        (input.is_some() || output.is_some())
            .then(|| Usage { input: input.unwrap_or_default(), output: output.unwrap_or_default() })
    }

    /// Whether this text, which has ended, is content: see [`Meter::content_events`](super::Meter::content_events).
    pub(super) fn is_content(&self) -> bool {
        let is_done = self.head.get().is_some_and(|head| head.trim_ascii_end() == b"[DONE]");
        self.head.first().is_some()
            && !is_done
            && !self.says.error
            && !self.says.aside
            && self.says.choices != Choices::Empty
    }

    fn can_only_report(&self) -> bool {
        !self.json.is_invalid()
            && matches!(self.head.first(), None | Some(b'{'))
            && matches!(self.says.choices, Choices::Unseen | Choices::Empty)
            && self.says.usage != Some(false)
            && !self.says.error
    }

    /// Whether this text, which has ended, only reports usage.
    pub(super) fn only_reports(&self) -> bool {
        self.can_only_report()
            && self.json.is_complete()
            && self.says.choices == Choices::Empty
            && self.says.usage == Some(true)
    }

    fn key(&mut self) {
        let (key, depth) = (self.json.text().unwrap_or_default(), self.json.depth());
        let count = match (depth, self.member) {
            (1, _) => {
                self.member = Member::of(key);
                self.in_usage = false;
                Count::of_ollama(key)
            }
            (2, Member::Usage) => Count::of(key),
            (2, Member::Envelope) => {
                self.in_usage = key == b"usage";
                None
            }
            (3, Member::Envelope) if self.in_usage => Count::of(key),
            // Deeper keys change nothing of what is read where they stand.
            _ => return,
        };
        self.count = count.map(|count| (depth, count));
    }

    fn value(&mut self, token: Token) {
        let begins = u8::from(matches!(token, Token::Array | Token::Object));
        let depth = self.json.depth() - begins;
        if let (Token::Count(number), Some((at, count))) = (token, self.count)
            && at == depth
        {
            *self.counts.of(count) = Some(number);
        }
        match (depth, self.member, token) {
            (1, Member::Usage, _) => {
                self.says.usage = Some(token == Token::Object && self.says.usage != Some(false));
            }
            (1 | 2, Member::Choices, _) => {
                self.says.choices = match (self.says.choices, depth, token) {
                    (Choices::Unseen, 1, Token::Array) => Choices::Empty,
                    (Choices::Empty, 2, _) => Choices::Some,
                    (seen, 2, _) | (seen, 1, Token::Array) => seen,
                    _ => Choices::NoArray,
                };
            }
            (1, Member::Error, token) => self.says.error |= token != Token::Null,
            (1, Member::Done, Token::True) => self.says.aside = true,
            (1, Member::Type, Token::Text) => match self.json.text().unwrap_or_default() {
                b"error" => self.says.error = true,
                kind => self.says.aside |= is_aside(kind),
            },
            _ => {}
        }
    }
}

impl Counts {
    const fn of(&mut self, count: Count) -> &mut Option<u64> {
        match count {
            Count::Prompt => &mut self.prompt,
            Count::Input => &mut self.input,
            Count::CacheCreation => &mut self.cache_creation,
            Count::CacheRead => &mut self.cache_read,
            Count::Output => &mut self.output,
        }
    }
}

impl Count {
    /// What stands in an object called `usage`.
    fn of(key: &[u8]) -> Option<Self> {
        Some(match key {
            b"prompt_tokens" => Self::Prompt,
            b"input_tokens" => Self::Input,
            b"cache_creation_input_tokens" => Self::CacheCreation,
            b"cache_read_input_tokens" => Self::CacheRead,
            b"completion_tokens" | b"output_tokens" => Self::Output,
            _ => return None,
        })
    }

    /// What stands in the outermost object.
    fn of_ollama(key: &[u8]) -> Option<Self> {
        Some(match key {
            b"prompt_eval_count" => Self::Prompt,
            b"eval_count" => Self::Output,
            _ => return None,
        })
    }
}

impl Member {
    fn of(key: &[u8]) -> Self {
        match key {
            b"usage" => Self::Usage,
            b"message" | b"response" => Self::Envelope,
            b"choices" => Self::Choices,
            b"type" => Self::Type,
            b"done" => Self::Done,
            b"error" => Self::Error,
            _ => Self::Other,
        }
    }
}

/// Whether data of this `type` goes beside the content: what begins, ends and describes it.
fn is_aside(kind: &[u8]) -> bool {
    match kind {
        b"message_start"
        | b"message_delta"
        | b"message_stop"
        | b"content_block_start"
        | b"content_block_stop"
        | b"ping" => true,
        _ => kind.starts_with(b"response.") && !kind.ends_with(b".delta"),
    }
}
