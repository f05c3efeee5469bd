//! The arithmetic of a choice: pure, with the time and the dice handed in.

use std::time::Duration;

use tokio::time::Instant;

/// What an [`Ewma`] forgets by two thirds: linkerd's default.
const DECAY: Duration = Duration::from_secs(10);
/// What a failure counts as, in multiples of what a response usually takes. A failure is fast, and would attract the
/// traffic that then fails. (linkerd's Load Biaser takes 5 s for a 429, whatever is usual: for an upstream that answers
/// within milliseconds, a minute's absence for a single one.)
const FAILURE: f64 = 10.0;
/// The same at least, in seconds.
const LEAST_FAILURE: f64 = 0.1;
/// The longest time that a failure counts as, in seconds: failures double what was there.
const WORST: f64 = 60.0;
/// What is heard after so long a silence says more of an endpoint than what was known before.
const SILENCE: Duration = Duration::from_secs(1);
/// The share of requests that goes by weight alone, to an endpoint that nothing was heard of for a while and that has
/// nothing in flight: it may have recovered. One that has not costs a request in a second at most, and one that hangs
/// one at a time.
pub const SAMPLED: f64 = 0.05;
/// Below this nobody tells endpoints apart, in seconds: a busy machine makes as much of a difference. Also what a new
/// one is taken for.
const LEAST: f64 = 0.005;
/// A second endpoint is taken where its load is less than this share of the first one's: what differs by less is noise,
/// and the weights decide.
const CLEARLY: f64 = 0.8;
/// The share of its weight that an endpoint comes back with (Envoy's `min_weight_percent`).
const FIRST_SHARE: f64 = 0.1;

/// A peak-sensitive moving average of times to the first byte (after Finagle's and tower's `PeakEwma`): a longer one is
/// taken over at once, shorter ones are approached. It fades while nothing is heard, so that an endpoint that was slow
/// once is asked again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ewma {
    seconds: f64,
    /// The plain average of responses, without failures; 0 where there was none.
    usual: f64,
    at: Option<Instant>,
}

impl Ewma {
    /// A response whose head took so long.
    pub fn observe(&mut self, took: Duration, now: Instant) {
        let kept = if self.usual > 0.0 { self.kept(now) } else { 0.0 };
        self.usual = self.usual * kept + took.as_secs_f64() * (1.0 - kept);
        self.take(took.as_secs_f64(), now);
    }

    /// A request that was given up after so long: it would have taken longer still.
    pub fn outlast(&mut self, took: Duration, now: Instant) {
        if took.as_secs_f64() > self.seconds(now) {
            self.take(took.as_secs_f64(), now);
        }
    }

    /// A failure, after so long, where responses of the upstream usually take `usual` seconds.
    pub fn fail(&mut self, took: Duration, usual: f64, now: Instant) {
        let bad = (FAILURE * usual).max(2.0 * self.seconds(now)).clamp(LEAST_FAILURE, WORST);
        self.take(bad.max(took.as_secs_f64()), now);
    }

    fn take(&mut self, sample: f64, now: Instant) {
        let kept = if self.is_silent(now) { self.kept(now).min(0.5) } else { self.kept(now) };
        self.seconds = if sample > self.seconds * kept { sample } else { self.seconds * kept + sample * (1.0 - kept) };
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
    }

    /// Whether nothing was heard for long enough that it is worth to ask.
    #[must_use]
    pub fn is_silent(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| now.saturating_duration_since(at) >= SILENCE)
    }

    /// What responses usually take, in seconds; nothing where there was none.
    #[must_use]
    pub fn usual(&self) -> Option<f64> {
        (self.usual > 0.0).then_some(self.usual)
    }

    /// How much of the average is left.
    fn kept(&self, now: Instant) -> f64 {
        let idle = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        (-idle.as_secs_f64() / DECAY.as_secs_f64()).exp()
    }

    /// The average now, in seconds.
    #[must_use]
    pub fn seconds(&self, now: Instant) -> f64 {
        (self.seconds * self.kept(now)).max(LEAST)
    }

    /// The last average, and when it was; nothing where nothing was heard.
    #[must_use]
    pub fn last(&self) -> Option<(Duration, Instant)> {
        self.at.map(|at| (Duration::from_secs_f64(self.seconds), at))
    }
}

/// The share of its weight that an endpoint has `since` it came back: from a tenth to all of it in `window`, in a line.
#[must_use]
pub fn slow_start(since: Duration, window: Duration) -> f64 {
    if since >= window {
        return 1.0;
    }
    let share = since.as_secs_f64() / window.as_secs_f64();
    FIRST_SHARE + (1.0 - FIRST_SHARE) * share
}

/// One of `weights`, each as likely as it weighs; `random` is from 0 to 1.
#[must_use]
pub fn draw(weights: &[f64], random: f64) -> usize {
    let mut left = random * weights.iter().sum::<f64>();
    for (n, weight) in weights.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return n;
        }
    }
    // Rounding, or a `random` of 1.
    weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0)
}

/// One of `left` in turn, each as often as it weighs and as evenly as that goes (nginx's smooth weighted round robin):
/// where it stands in `left`. `owed` says of everybody how many requests short of its share it is. Whoever is out keeps
/// that, so that it is neither made up for nor lost when others take turns.
#[must_use]
pub fn in_turn(owed: &mut [f64], left: &[usize], weights: &[f64]) -> usize {
    let total = weights.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let mut first = 0;
    for (n, (place, weight)) in left.iter().zip(weights).enumerate() {
        owed[*place] += weight / total;
        if owed[*place] > owed[left[first]] {
            first = n;
        }
    }
    owed[left[first]] -= 1.0;
    first
}

/// How long there is to wait at an endpoint that takes `seconds` for the first byte and has so many `in_flight`. `share`
/// is its weight next to the mean, so that the unit of the weights makes no difference. The request to come counts the
/// same at all of them: where nothing is in flight the weights decide, by the draw.
#[must_use]
pub fn wait(in_flight: f64, share: f64, seconds: f64) -> f64 {
    seconds * (in_flight / share + 1.0)
}

/// One of `left`, with its name and weight, for `key`: the same one everywhere and each time, and where it goes another
/// one for its own keys alone (weighted rendezvous hashing).
#[must_use]
pub fn by_key<'a>(key: &[u8], left: impl Iterator<Item = (&'a str, u32)>) -> usize {
    let key = fnv(key).to_be_bytes();
    let distance = |(name, weight): (&str, u32)| {
        let hash = fnv(&[name.as_bytes(), &key].concat());
        -even(hash).ln() / f64::from(weight).max(f64::MIN_POSITIVE)
    };
    let nearest = left.map(distance).enumerate().min_by(|(_, one), (_, other)| one.total_cmp(other));
    nearest.map_or(0, |(n, _)| n)
}

/// FNV-1a of 128 bits.
#[must_use]
pub fn fnv(bytes: &[u8]) -> u128 {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME))
}

/// A hash as a number between 0 and 1, both excluded. What differs in a few bits is far apart (`SplitMix64`'s last steps).
fn even(hash: u128) -> f64 {
    let bytes = hash.to_be_bytes();
    let half = |from: usize| bytes[from..from + 8].iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
    let mut mixed = half(0) ^ half(8);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    (f64::from(u32::try_from(mixed >> 32).unwrap_or(u32::MAX)) + 0.5) / (f64::from(u32::MAX) + 1.0)
}

/// The better of two different ones that are drawn at random (the power of two choices): `load` says how busy each is,
/// in any unit. Where that tells little, the one that was drawn first is taken, so that idle endpoints are asked as
/// often as they weigh.
#[must_use]
pub fn of_two(weights: &mut [f64], mut random: impl FnMut() -> f64, load: impl Fn(usize) -> f64) -> usize {
    let first = draw(weights, random());
    if weights.len() < 2 {
        return first;
    }
    weights[first] = 0.0;
    let second = draw(weights, random());
    if load(second) < load(first) * CLEARLY { second } else { first }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[tokio::test(start_paused = true)]
    async fn a_peak_is_taken_over_at_once_and_fades() {
        let start = Instant::now();
        let mut ewma = Ewma::default();
        ewma.observe(ms(10), start);
        ewma.observe(ms(900), start + ms(1));
        assert!(ewma.seconds(start + ms(1)) > 0.89);
        ewma.observe(ms(10), start + ms(2));
        assert!(ewma.seconds(start + ms(2)) > 0.89, "one good one does not mend it");
        assert!(ewma.seconds(start + Duration::from_secs(30)) < 0.05, "silence does");
        assert!(ewma.seconds(start + Duration::from_secs(3600)) >= LEAST);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_failure_looks_slow() {
        let now = Instant::now();
        let (mut fails, mut works) = (Ewma::default(), Ewma::default());
        for n in 0..10 {
            fails.fail(ms(1), 0.8, now + ms(n));
            works.observe(ms(800), now + ms(n));
        }
        assert!(fails.seconds(now + ms(10)) > 5.0 * works.seconds(now + ms(10)));
        assert!(fails.seconds(now + ms(10)) <= WORST);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_costs_a_multiple_of_what_is_usual_and_samples_mend_it() {
        let start = Instant::now();
        let mut ewma = Ewma::default();
        for n in 0..100 {
            ewma.observe(ms(30), start + ms(100 * n));
        }
        assert!((ewma.usual().unwrap() - 0.03).abs() < 0.001);
        let failed = start + Duration::from_secs(10);
        ewma.fail(ms(1), 0.03, failed);
        assert!((ewma.seconds(failed) - 0.3).abs() < 0.01, "{}", ewma.seconds(failed));
        assert!((ewma.usual().unwrap() - 0.03).abs() < 0.001, "a failure is not usual");
        for n in 1..=5 {
            ewma.observe(ms(30), failed + Duration::from_secs(n));
        }
        let after = ewma.seconds(failed + Duration::from_secs(5));
        assert!(after < 0.03 / CLEARLY, "{after} after five responses, a second apart");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_given_up_is_a_peak_or_says_nothing() {
        let now = Instant::now();
        let mut ewma = Ewma::default();
        ewma.observe(ms(300), now);
        ewma.outlast(ms(200), now + ms(1));
        assert!(ewma.seconds(now + ms(1)) > 0.29);
        ewma.outlast(ms(900), now + ms(2));
        assert!(ewma.seconds(now + ms(2)) > 0.89);
    }

    #[test]
    fn weight_comes_back_in_a_line() {
        let window = Duration::from_secs(10);
        for (seconds, percent) in [(0, 10.0), (5, 55.0), (10, 100.0), (99, 100.0)] {
            let share = slow_start(Duration::from_secs(seconds), window) * 100.0;
            assert!((share - percent).abs() < 0.01, "{share} after {seconds} s");
        }
        assert!((slow_start(Duration::ZERO, Duration::ZERO) - 1.0).abs() < f64::EPSILON, "there is none");
    }

    #[test]
    fn idle_endpoints_are_asked_as_often_as_they_weigh_and_busy_ones_are_left() {
        let mut counts = [0, 0];
        for n in 0..100 {
            counts[of_two(&mut [3.0, 1.0], || f64::from(n) / 100.0, |_| 0.0)] += 1;
        }
        assert_eq!(counts, [75, 25]);
        for n in 0..100 {
            let busy = |which| if which == 0 { 2.0 } else { 1.0 };
            assert_eq!(of_two(&mut [3.0, 1.0], || f64::from(n) / 100.0, busy), 1);
        }
    }

    #[test]
    fn turns_are_even() {
        let mut owed = [0.0; 3];
        let turns: Vec<_> = (0..7).map(|_| in_turn(&mut owed, &[0, 1, 2], &[5.0, 1.0, 1.0])).collect();
        assert_eq!(turns, [0, 0, 1, 0, 2, 0, 0], "as nginx has it");
    }

    #[test]
    fn keys_are_shared_by_weight() {
        let mut counts = [0; 3];
        for n in 0..10_000 {
            counts[by_key(
                format!("k{n}").as_bytes(),
                [("10.0.0.1:80", 6), ("10.0.0.2:80", 3), ("10.0.0.3:80", 1)].into_iter(),
            )] += 1;
        }
        for (count, due) in counts.into_iter().zip([6000, 3000, 1000_i32]) {
            assert!((count - due).abs() < 300, "{counts:?}");
        }
    }

    proptest! {
        #[test]
        fn a_key_moves_only_where_its_own_endpoint_goes(key in vec(any::<u8>(), 0..20), weights in vec(1..=1000_u32, 2..20), gone in 0..20_usize) {
            let names: Vec<_> = (0..weights.len()).map(|n| format!("10.0.0.{n}:80")).collect();
            let all = || names.iter().map(String::as_str).zip(weights.iter().copied()).enumerate();
            let gone = gone % weights.len();
            let home = by_key(&key, all().map(|(_, one)| one));
            let after = by_key(&key, all().filter(|(n, _)| *n != gone).map(|(_, one)| one));
            let after = after + usize::from(after >= gone);
            prop_assert!(home == gone || after == home);
        }

        #[test]
        fn whoever_is_out_the_others_take_turns_by_their_weights(
            weights in vec(1..=1000_u16, 2..8),
            phases in vec((vec(any::<bool>(), 8), 1..400_u16), 1..12),
        ) {
            let mut owed = vec![0.0; weights.len()];
            for (is_left, turns) in phases {
                let left: Vec<_> = (0..weights.len()).filter(|n| is_left[*n]).collect();
                if left.is_empty() {
                    continue;
                }
                let weights: Vec<_> = left.iter().map(|n| f64::from(weights[*n])).collect();
                let mut counts = vec![0.0; left.len()];
                for _ in 0..turns {
                    counts[in_turn(&mut owed, &left, &weights)] += 1.0;
                }
                let total: f64 = weights.iter().sum();
                for (count, weight) in counts.iter().zip(&weights) {
                    let due = f64::from(turns) * weight / total;
                    prop_assert!((count - due).abs() <= 4.0, "{counts:?} for {weights:?}: {due} are due");
                }
            }
        }

        #[test]
        fn what_weighs_nothing_is_not_drawn(weights in vec(0..5_u8, 1..20), random in 0.0..=1.0_f64) {
            let weights: Vec<_> = weights.into_iter().map(f64::from).collect();
            let drawn = draw(&weights, random);
            prop_assert!(weights[drawn] > 0.0 || weights.iter().all(|weight| *weight == 0.0));
        }

        #[test]
        fn an_average_stays_between_the_shortest_and_the_worst(
            samples in vec((0..100_000_u64, 0..20_000_u64, any::<bool>()), 1..50),
            usual in 0.0..100.0_f64,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _entered = runtime.enter();
            let (mut now, mut ewma) = (Instant::now(), Ewma::default());
            let mut longest = WORST;
            for (took, gap, failed) in samples {
                now += ms(gap);
                let took = ms(took);
                longest = longest.max(took.as_secs_f64());
                if failed { ewma.fail(took, usual, now) } else { ewma.observe(took, now) }
                prop_assert!((LEAST..=longest).contains(&ewma.seconds(now)));
            }
        }

        #[test]
        fn a_share_of_weight_never_shrinks(since in 0..20_000_u64, more in 0..20_000_u64, window in 1..20_000_u64) {
            let (early, late) = (slow_start(ms(since), ms(window)), slow_start(ms(since + more), ms(window)));
            prop_assert!((FIRST_SHARE..=late).contains(&early) && late <= 1.0);
        }
    }
}
