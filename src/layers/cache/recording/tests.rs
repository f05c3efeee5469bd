use std::pin::Pin;

use futures_util::FutureExt;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame};
use http_body_util::BodyExt;
use proptest::prelude::*;
use tokio::sync::mpsc;

use super::{super::resume::Streams, reader::PATIENCE, *};
use crate::{
    message::{BoxError, Error, Kind},
    sse::Labels,
};

/// A body of what is sent, and what came of its recording.
struct Stage {
    send: mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>,
    recording: Arc<Recording>,
    end: Arc<Mutex<Option<Result<Whole, Lost>>>>,
}

struct Sent(mpsc::UnboundedReceiver<Result<Frame<Bytes>, BoxError>>);

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.0.poll_recv(cx)
    }
}

impl Stage {
    fn new(limit: usize) -> Self {
        let (send, frames) = mpsc::unbounded_channel();
        let end = Arc::new(Mutex::new(None));
        let told = end.clone();
        let recording = Recording::new(Body::new(Sent(frames)), limit, Budget::new(1000), None, move |whole| {
            *told.lock() = Some(whole);
        });
        Self { send, recording, end }
    }

    fn say(&self, text: &'static str) {
        self.send.send(Ok(Frame::data(Bytes::from_static(text.as_bytes())))).unwrap();
    }

    fn hang_up(&mut self) {
        self.send = mpsc::unbounded_channel().0;
    }

    fn end(&self) -> Option<Result<Bytes, Lost>> {
        self.end.lock().as_ref().map(|whole| whole.as_ref().map(|whole| whole.body.clone()).map_err(|lost| *lost))
    }
}

/// All that can be read now.
fn read(reader: &mut Reader) -> String {
    let mut text = String::new();
    while let Some(Some(frame)) = reader.frame().now_or_never() {
        text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
    }
    text
}

#[tokio::test]
async fn who_comes_late_gets_the_beginning_at_once_and_then_what_comes() {
    let mut stage = Stage::new(100);
    let mut first = stage.recording.reader().unwrap();
    stage.say("a");
    stage.say("b");
    assert_eq!(read(&mut first), "ab");
    let mut late = stage.recording.reader().unwrap();
    assert_eq!(read(&mut late), "ab");
    stage.say("c");
    assert_eq!(read(&mut late), "c", "whoever is polled asks the upstream");
    assert_eq!(read(&mut first), "c");
    stage.hang_up();
    let (first, late) = tokio::join!(first.frame(), late.frame());
    assert!(first.is_none() && late.is_none());
    assert_eq!(stage.end().unwrap().unwrap(), "abc");
}

#[tokio::test]
async fn what_comes_wakes_all_who_wait() {
    let mut stage = Stage::new(100);
    let mut readers: Vec<_> = (0..10).map(|_| stage.recording.reader().unwrap()).collect();
    let reading: Vec<_> =
        readers.drain(..).map(|reader| tokio::spawn(async { reader.collect().await.unwrap().to_bytes() })).collect();
    for text in ["a", "b", "c"] {
        tokio::task::yield_now().await;
        stage.say(text);
    }
    tokio::task::yield_now().await;
    stage.hang_up();
    for one in reading {
        assert_eq!(one.await.unwrap(), "abc");
    }
}

#[tokio::test]
async fn the_first_may_leave_and_when_the_last_does_the_upstream_is_cancelled() {
    let stage = Stage::new(100);
    let Stage { send, recording, end } = stage;
    let (mut first, mut second) = (recording.reader().unwrap(), recording.reader().unwrap());
    drop(recording);
    assert!(first.frame().now_or_never().is_none());
    assert!(second.frame().now_or_never().is_none());
    let waiting = tokio::spawn(async move {
        let frame = second.frame().await;
        (second, frame)
    });
    tokio::task::yield_now().await;
    drop(first);
    send.send(Ok(Frame::data(Bytes::from_static(b"a")))).unwrap();
    let (second, frame) = waiting.await.unwrap();
    assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "a");
    assert!(!send.is_closed());
    drop(second);
    assert!(send.is_closed());
    assert!(end.lock().is_none(), "nothing is stored");
}

#[tokio::test]
async fn a_break_breaks_off_for_all_and_nothing_is_stored() {
    let stage = Stage::new(100);
    let (mut first, mut second) = (stage.recording.reader().unwrap(), stage.recording.reader().unwrap());
    stage.say("a");
    stage.send.send(Err(Error::from(Kind::UpstreamTimeout).into())).unwrap();
    assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "a");
    let kind = |frame: Option<Result<Frame<Bytes>, BoxError>>| {
        Error::find(&*frame.unwrap().unwrap_err()).map(Error::kind).unwrap()
    };
    assert_eq!(kind(first.frame().await), Kind::UpstreamTimeout);
    assert_eq!(second.frame().await.unwrap().unwrap().into_data().unwrap(), "a");
    assert_eq!(kind(second.frame().await), Kind::UpstreamTimeout);
    assert_eq!(stage.end(), Some(Err(Lost::Broken)));
    // A length would make what is at hand look like all of it.
    let late = stage.recording.reader().unwrap();
    assert_eq!((late.size_hint().lower(), late.size_hint().exact()), (1, None));
    assert!(!late.is_end_stream());
}

#[tokio::test]
async fn what_grows_too_large_is_not_kept_and_nobody_runs_away() {
    let mut stage = Stage::new(4);
    let (mut fast, mut slow) = (stage.recording.reader().unwrap(), stage.recording.reader().unwrap());
    for text in ["ab", "cd", "ef", "gh", "ij"] {
        stage.say(text);
    }
    assert_eq!(read(&mut fast), "abcdef", "one more than the limit, and then it waits for the other");
    assert_eq!(stage.end(), Some(Err(Lost::TooLarge)), "as soon as it is known");
    let fast = tokio::spawn(async { fast.collect().await.unwrap().to_bytes() });
    tokio::task::yield_now().await;
    assert_eq!(slow.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
    assert!(stage.recording.reader().is_none(), "the beginning is gone");
    drop(slow);
    stage.hang_up();
    assert_eq!(fast.await.unwrap(), "ghij");
}

#[tokio::test(start_paused = true)]
async fn who_keeps_the_others_waiting_is_cut_off() {
    let mut stage = Stage::new(4);
    let (fast, mut idle) = (stage.recording.reader().unwrap(), stage.recording.reader().unwrap());
    for text in ["ab", "cd", "ef", "gh"] {
        stage.say(text);
    }
    stage.hang_up();
    let begun = Instant::now();
    assert_eq!(fast.collect().await.unwrap().to_bytes(), "abcdefgh");
    assert_eq!(begun.elapsed(), PATIENCE);
    let error = idle.frame().await.unwrap().unwrap_err();
    assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::ClientTimeout));
    assert_eq!((idle.size_hint().exact(), idle.is_end_stream()), (Some(0), false));
}

#[tokio::test]
async fn all_that_are_on_their_way_have_one_budget() {
    let budget = Budget::new(5);
    let stages = [(); 2].map(|()| {
        let mut stage = Stage::new(4);
        let (send, frames) = mpsc::unbounded_channel();
        let told = stage.end.clone();
        stage.recording = Recording::new(Body::new(Sent(frames)), 4, budget.clone(), None, move |whole| {
            *told.lock() = Some(whole);
        });
        stage.send = send;
        stage
    });
    let [mut first, mut second] = stages.each_ref().map(|stage| stage.recording.reader().unwrap());
    for stage in &stages {
        stage.say("abc");
    }
    assert_eq!((read(&mut first), read(&mut second)), ("abc".to_owned(), "abc".to_owned()));
    assert_eq!((stages[0].end(), stages[1].end()), (None, Some(Err(Lost::TooLarge))));
    assert_eq!(budget.used(), 3, "who is alone keeps nothing");
    drop((first, second, stages));
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn trailers_are_everybodys() {
    let mut stage = Stage::new(4);
    let mut reader = stage.recording.reader().unwrap();
    let trailers: HeaderMap = [(http::header::ETAG, "1".parse().unwrap())].into_iter().collect();
    stage.say("a");
    stage.send.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
    stage.hang_up();
    let (mut late, first) = (stage.recording.reader().unwrap(), reader.frame().await);
    assert_eq!(first.unwrap().unwrap().into_data().unwrap(), "a");
    assert_eq!(reader.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
    assert!(reader.frame().await.is_none());
    assert!(!late.is_end_stream());
    assert_eq!((late.size_hint().lower(), late.size_hint().exact()), (1, None), "trailers need a place");
    late.frame().await;
    assert_eq!(late.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
    assert!(late.frame().await.is_none());
    assert_eq!(stage.end.lock().take().unwrap().unwrap().trailers, Some(trailers));
}

#[tokio::test(start_paused = true)]
async fn who_keeps_the_others_waiting_again_and_again_is_cut_off() {
    // How often the upstream has four frames, and how long the slow reader takes for each: two are kept for it.
    for (every, takes, is_cut) in [(10, 950, true), (1000, 100, false), (1000, 240, true)] {
        let stage = Stage::new(10);
        let [mut slow, mut fast] = [stage.recording.reader().unwrap(), stage.recording.reader().unwrap()];
        let millis = Duration::from_millis;
        let reading = tokio::spawn(async move {
            for _ in 0..400 {
                fast.frame().await.unwrap().unwrap();
            }
        });
        let slowly = tokio::spawn(async move {
            for _ in 0..400 {
                let Some(Ok(_)) = slow.frame().await else { return true };
                tokio::time::sleep(millis(takes)).await;
            }
            false
        });
        let begun = Instant::now();
        for _ in 0..100 {
            for _ in 0..4 {
                stage.say("abcdef");
            }
            tokio::time::sleep(millis(every)).await;
        }
        reading.await.unwrap();
        let took = begun.elapsed();
        assert!(took < millis(100 * every) + 2 * PATIENCE, "the fast one had all after {took:?}");
        assert_eq!(slowly.await.unwrap(), is_cut, "{every} {takes}");
    }
}

#[tokio::test(start_paused = true)]
async fn frames_keep_their_times() {
    let mut stage = Stage::new(100);
    let mut reader = stage.recording.reader().unwrap();
    for text in ["a", "bc"] {
        stage.say(text);
        reader.frame().await.unwrap().unwrap();
        tokio::time::advance(Duration::from_millis(30)).await;
    }
    stage.hang_up();
    assert!(reader.frame().await.is_none());
    let whole = stage.end.lock().take().unwrap().unwrap();
    assert_eq!(*whole.cuts, [Cut { end: 1, at: 0 }, Cut { end: 3, at: 30 }]);
    assert_eq!(whole.took, Duration::from_millis(60));
}

/// A stage whose recording is kept for those who come again, and the room that it takes.
fn held(limit: usize, most: u64) -> (Stage, Arc<Streams>) {
    let stage = Stage::new(limit);
    let streams = Streams::new(Arc::default());
    streams.limit(most);
    stage.recording.hold(streams.room().share(), true);
    (stage, streams)
}

fn after(stage: &Stage, event: u64) -> Option<String> {
    let (mut reader, numbering) = stage.recording.reader_after(event)?;
    let mut labels = Labels::after("r", numbering, event);
    let rest = labels.pass(Bytes::from(read(&mut reader)));
    Some(String::from_utf8(rest.to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn what_nobody_reads_is_read_on_up_to_the_limit_and_then_waits() {
    let (stage, _streams) = held(40, 1 << 20);
    let mut reader = stage.recording.reader().unwrap();
    stage.say("data: 1\n\n");
    assert_eq!(read(&mut reader), "data: 1\n\n");
    drop(reader);
    assert!(stage.recording.deserted().now_or_never().flatten().is_some());
    for _ in 0..9 {
        stage.say("data: 2\n\n");
    }
    assert!(stage.recording.read_on().now_or_never().is_none());
    assert_eq!(stage.recording.state.lock().frames.len(), 5, "as much as there is room for, and one more");
    let rest = after(&stage, 1).unwrap();
    assert_eq!(rest.matches("data: 2").count(), 9, "nothing is lost: {rest}");
    assert!(rest.ends_with("id: r.10\n\n"), "{rest}");
}

#[tokio::test(start_paused = true)]
async fn it_is_let_go_when_nobody_has_read_it_for_so_long() {
    let (mut stage, _streams) = held(100, 1 << 20);
    let secs = Duration::from_secs;
    let mut reader = stage.recording.reader().unwrap();
    stage.say("data: 1\n\n");
    read(&mut reader);
    tokio::time::advance(secs(60)).await;
    assert!(!stage.recording.expire(secs(10)), "somebody reads it");
    drop(reader);
    tokio::time::advance(secs(9)).await;
    assert!(!stage.recording.expire(secs(10)));
    assert_eq!(after(&stage, 1).unwrap(), "", "and somebody did again");
    tokio::time::advance(secs(9)).await;
    assert!(!stage.recording.expire(secs(10)));
    stage.hang_up();
    assert!(stage.recording.read_on().now_or_never().is_none());
    for _ in 0..2 {
        tokio::time::advance(secs(4)).await;
        assert_eq!(after(&stage, 0).unwrap(), "data: 1\nid: r.1\n\n", "it has ended, and is kept");
        assert!(!stage.recording.expire(secs(10)));
    }
    tokio::time::advance(secs(4)).await;
    assert_eq!(after(&stage, 1).unwrap(), "");
    assert!(stage.recording.expire(secs(10)), "since its end, whoever asked for it meanwhile");
    assert!(after(&stage, 1).is_none() && stage.recording.deserted().await.is_none());
}

#[tokio::test]
async fn what_is_let_go_when_nobody_reads_it_takes_no_memory_any_more() {
    for ends in [false, true] {
        let (mut stage, streams) = held(100, 1 << 20);
        let mut reader = stage.recording.reader().unwrap();
        stage.say("data: 1\n\n");
        read(&mut reader);
        drop(reader);
        if ends {
            stage.hang_up();
        }
        let recording = stage.recording.clone();
        let keeper = tokio::spawn(async move { recording.read_on().await });
        tokio::task::yield_now().await;
        assert!(!keeper.is_finished());
        stage.recording.let_go();
        tokio::task::yield_now().await;
        assert!(keeper.is_finished(), "who keeps it is told");
        let inner = stage.recording.state.lock();
        assert_eq!((inner.frames.len(), inner.budget.used()), (0, 0));
        drop((inner, streams));
        assert!(stage.recording.reader().is_none(), "what was there is gone");
    }
}

#[tokio::test]
async fn of_what_grows_too_large_the_last_part_is_kept() {
    let (stage, _streams) = held(40, 1 << 20);
    let mut reader = stage.recording.reader().unwrap();
    for text in ["data: 1\n\n", "data: 2\n", "\n", "data: 3\n\ndata: 4\n", "\ndata: 5\n\n", "data: 6\n\n"] {
        stage.say(text);
    }
    read(&mut reader);
    assert!(stage.recording.state.lock().kept <= 40);
    assert!(after(&stage, 1).is_none(), "the first half of the second is gone");
    let rest = |from: usize| (from..=6).map(|n| format!("data: {n}\nid: r.{n}\n\n")).collect::<Vec<_>>().concat();
    for n in 2..=6 {
        assert_eq!(after(&stage, n).unwrap(), rest(usize::try_from(n).unwrap() + 1), "{n}");
    }
    assert!(after(&stage, 7).is_none(), "it has not come");
}

#[tokio::test]
async fn what_is_kept_is_looked_through_once_for_all_who_come() {
    let (stage, _streams) = held(1 << 20, 1 << 30);
    let mut reader = stage.recording.reader().unwrap();
    let text = |n: usize| format!("data: {n} {}\n\n", "x".repeat(10_000));
    for n in 1..=100 {
        stage.send.send(Ok(Frame::data(text(n).into()))).unwrap();
    }
    let marks = || {
        let inner = stage.recording.state.lock();
        let held = inner.held.as_ref().unwrap();
        held.marks.iter().map(|(frame, numbering)| (*frame, numbering.count())).collect::<Vec<_>>()
    };
    let rest = |from: usize| {
        (from..=100).map(|n| text(n).trim_end().to_owned() + &format!("\nid: r.{n}\n\n")).collect::<String>()
    };
    read(&mut reader);
    for after in [99, 50, 6, 7, 8, 1, 100, 99] {
        assert!(self::after(&stage, after as u64).unwrap() == rest(after + 1), "{after}");
    }
    let found = marks();
    assert_eq!(found.len(), 14, "one for 64 KiB each, whoever came how often");
    assert!(found.iter().all(|&(frame, count)| frame as u64 == count));
    // What is gone is not looked for.
    tokio::task::yield_now().await;
    for n in 101..=120 {
        stage.send.send(Ok(Frame::data(text(n).into()))).unwrap();
    }
    read(&mut reader);
    let gone = stage.recording.state.lock().gone;
    assert!(gone > 0 && marks().iter().all(|(frame, _)| *frame >= gone));
    let last = after(&stage, 119).unwrap();
    assert!(last.ends_with("id: r.120\n\n") && last.len() < 11_000);
}

#[tokio::test]
async fn where_there_is_no_room_it_is_not_kept() {
    let (stage, streams) = held(1000, 3000);
    let mut reader = stage.recording.reader().unwrap();
    stage.say("data: 1\n\n");
    read(&mut reader);
    assert!(after(&stage, 1).is_some());
    let others = [streams.room().share(), streams.room().share()];
    stage.say("data: 2\n\n");
    assert_eq!(read(&mut reader), "data: 2\n\n");
    assert!(after(&stage, 1).is_none());
    stage.say("data: 3\n\n");
    assert_eq!(read(&mut reader), "data: 3\n\n", "who reads it gets all");
    assert!(read(&mut reader).is_empty() && stage.recording.state.lock().frames.is_empty());
    drop(others);
}

#[tokio::test]
async fn of_what_broke_off_only_what_was_missed_can_be_taken_up() {
    let (stage, _streams) = held(100, 1 << 20);
    let mut reader = stage.recording.reader().unwrap();
    stage.say("data: 1\n\ndata: 2\n\n");
    stage.send.send(Err(Error::from(Kind::UpstreamReset).into())).unwrap();
    reader.frame().await.unwrap().unwrap();
    reader.frame().await.unwrap().unwrap_err();
    let (mut again, _) = stage.recording.reader_after(1).unwrap();
    again.frame().await.unwrap().unwrap();
    again.frame().await.unwrap().unwrap_err();
    assert!(stage.recording.reader_after(2).is_none(), "the upstream is asked again");
}

#[tokio::test]
async fn a_copier_gets_what_is_kept_and_is_told_of_what_is_new_and_of_the_end() {
    let (mut stage, _streams) = held(40, 1 << 20);
    let recording = stage.recording.clone();
    let copy = |from: &Cursor, most| recording.copy(from, most);
    let start = stage.recording.copied().unwrap();
    let mut reader = stage.recording.reader().unwrap();
    assert!(matches!(copy(&start, 9), Copied::Nothing));
    tokio::join!(stage.recording.news(&start), async {
        stage.say("data: 1\n\n");
        assert!(matches!(copy(&start, 9), Copied::Nothing), "it asks no upstream");
        read(&mut reader);
    });
    let Copied::Data(pieces, mut next) = copy(&start, 4) else { panic!("there is some") };
    assert_eq!((pieces.concat(), next.at), (b"data".to_vec(), 4));
    for piece in &pieces {
        next.numbering.pass(piece);
    }
    let Copied::Data(pieces, next) = copy(&next, 100) else { panic!("and more") };
    assert_eq!((pieces.concat(), next.at), (b": 1\n\n".to_vec(), 9));
    // One that is left behind too far has missed something, and can begin with what is there.
    for _ in 0..9 {
        stage.say("data: 2\n\n");
    }
    read(&mut reader);
    assert!(matches!(copy(&next, 9), Copied::Missed));
    let front = stage.recording.copied().unwrap();
    assert_eq!((front.at, front.numbering.count()), (54, 6));
    let Copied::Data(pieces, end) = copy(&front, 100) else { panic!("what is kept") };
    assert_eq!((pieces.concat(), end.at), ("data: 2\n\n".repeat(4).into_bytes(), 90));
    let (_, before) = stage.recording.last_reader().unwrap();
    assert_eq!(before, 90);
    assert!(stage.recording.news(&end).now_or_never().is_none());
    stage.hang_up();
    tokio::join!(stage.recording.news(&end), async { assert!(reader.frame().await.is_none()) });
    assert!(matches!(stage.recording.copy(&end, 9), Copied::Whole(None)));
    stage.recording.let_go();
    assert!(matches!(stage.recording.copy(&end, 9), Copied::LetGo));
    assert!(stage.recording.copied().is_none() && stage.recording.is_let_go());
}

proptest! {
    #[test]
    fn whoever_reads_when_all_get_the_same(
        frames in prop::collection::vec("[a-z]{1,6}", 1..12),
        steps in prop::collection::vec(0usize..5, 0..80),
        limit in 1usize..60,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let _entered = runtime.enter();
        let mut stage = Stage::new(limit);
        let mut readers: Vec<(Reader, String)> = Vec::new();
        let mut left = frames.iter();
        for step in steps {
            match step {
                0 => readers.extend(stage.recording.reader().map(|reader| (reader, String::new()))),
                1 => if let Some(text) = left.next() {
                    stage.send.send(Ok(Frame::data(Bytes::from(text.clone())))).unwrap();
                },
                2 if readers.len() > 1 => drop(readers.swap_remove(0)),
                n => {
                    let count = readers.len().max(1);
                    if let Some((reader, text)) = readers.get_mut(n % count) {
                        text.push_str(&read(reader));
                    }
                }
            }
        }
        for text in left {
            stage.send.send(Ok(Frame::data(Bytes::from(text.clone())))).unwrap();
        }
        stage.hang_up();
        // In turns, as those that wait for each other would be woken.
        for _ in 0..frames.len() * (readers.len() + 1) {
            for (reader, text) in &mut readers {
                text.push_str(&read(reader));
            }
        }
        let all: String = frames.concat();
        for (mut reader, text) in readers {
            prop_assert_eq!(&text, &all);
            prop_assert!(reader.frame().now_or_never().unwrap().is_none());
        }
        if let Some(Ok(whole)) = stage.end() {
            prop_assert_eq!(whole, all.as_bytes());
            prop_assert!(all.len() <= limit);
        }
    }
}
