//! How long queries outlive the clients' interest (spec: view-syncer-cvr §1.4).

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Cvr, Query, QueryHash};

/// TTL of a desire that names none: five minutes.
pub const DEFAULT_TTL_MS: f64 = 300_000.0;
/// No TTL is longer: ten minutes.
pub const MAX_TTL_MS: f64 = 600_000.0;
/// The TTL "forever". Clamped to [`MAX_TTL_MS`] like anything longer.
pub const FOREVER: f64 = -1.0;

/// A value of a group's clock: ms of connected time since the group was created.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct TtlClock(pub f64);

impl TtlClock {
    /// Where every group begins.
    pub const ZERO: TtlClock = TtlClock(0.0);

    /// The clock `ms` later.
    pub fn plus(self, ms: f64) -> TtlClock {
        TtlClock(self.0 + ms)
    }
}

/// A running [`TtlClock`]: advances with wall time while clients are connected.
#[derive(Debug, Clone, Copy)]
pub struct TtlTimer {
    clock: TtlClock,
    base_ms: f64,
}

impl TtlTimer {
    /// Continues a stored clock at wall time `now_ms`.
    pub fn resume(clock: TtlClock, now_ms: f64) -> TtlTimer {
        TtlTimer { clock, base_ms: now_ms }
    }

    /// The clock now. A wall clock that stepped back does not turn it back.
    pub fn read(&mut self, now_ms: f64) -> TtlClock {
        self.clock.0 += (now_ms - self.base_ms).max(0.0);
        self.base_ms = now_ms;
        self.clock
    }

    /// The first connection after a pause: the pause does not count.
    pub fn skip_pause(&mut self, now_ms: f64) {
        self.base_ms = now_ms;
    }
}

/// A TTL as clients write it: ms, `"none"`, `"forever"`, or a number with `s`, `m`, `h`, `d`, `y`.
/// `None` if it is none of these.
pub fn parse_ttl(ttl: &serde_json::Value) -> Option<f64> {
    match ttl {
        serde_json::Value::Number(n) => n.as_f64().map(normalize_ttl),
        serde_json::Value::String(s) => parse_ttl_text(s),
        _ => None,
    }
}

/// NaN is none, negative or infinite is forever.
fn normalize_ttl(ms: f64) -> f64 {
    if ms.is_nan() {
        0.0
    } else if !ms.is_finite() || ms < 0.0 {
        FOREVER
    } else {
        ms
    }
}

fn parse_ttl_text(text: &str) -> Option<f64> {
    match text {
        "none" => return Some(0.0),
        "forever" => return Some(FOREVER),
        _ => {}
    }
    let unit_ms = match text.as_bytes().last()? {
        b's' => 1_000.0,
        b'm' => 60_000.0,
        b'h' => 3_600_000.0,
        b'd' => 86_400_000.0,
        b'y' => 365.0 * 86_400_000.0,
        _ => return None,
    };
    let count: f64 = text[..text.len() - 1].parse().ok()?;
    Some(normalize_ttl(count * unit_ms))
}

/// Forever and anything longer than [`MAX_TTL_MS`] is that; otherwise unchanged.
pub fn clamp_ttl(ms: f64) -> f64 {
    if (0.0..=MAX_TTL_MS).contains(&ms) { ms } else { MAX_TTL_MS }
}

/// Orders TTLs as given by clients: forever is above everything.
pub fn compare_ttl(a: f64, b: f64) -> Ordering {
    match (a < 0.0, b < 0.0) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        (false, false) => a.total_cmp(&b),
    }
}

/// True if no client wants the query and every TTL has run out. A query without any client state
/// is expired at once; an internal one never.
pub fn is_expired(query: &Query, clock: TtlClock) -> bool {
    !query.is_internal()
        && query.client_state.values().all(|state| {
            state.inactivated_at.is_some_and(|at| at.plus(clamp_ttl(state.ttl_ms)) <= clock)
        })
}

/// A query that only waits for its TTL to end.
#[derive(Debug, Clone, PartialEq)]
pub struct InactiveQuery {
    /// The query.
    pub id: QueryHash,
    /// TTL of the client state that ends last, ms.
    pub ttl_ms: f64,
    /// When that client let go of it.
    pub inactivated_at: TtlClock,
}

impl InactiveQuery {
    /// When it may be evicted.
    pub fn expires_at(&self) -> TtlClock {
        self.inactivated_at.plus(clamp_ttl(self.ttl_ms))
    }
}

/// Queries of which at least one client state is left and none is active, soonest eviction first
/// (equal TTLs: by inactivation).
pub fn inactive_queries(queries: &BTreeMap<QueryHash, Arc<Query>>) -> Vec<InactiveQuery> {
    let mut inactive: Vec<_> = queries
        .values()
        .filter(|q| !q.is_internal() && !q.client_state.is_empty() && !q.is_active())
        .filter_map(|q| {
            q.client_state
                .values()
                .filter_map(|s| {
                    let inactivated_at = s.inactivated_at?;
                    Some(InactiveQuery { id: q.id.clone(), ttl_ms: s.ttl_ms, inactivated_at })
                })
                .max_by(|a, b| a.expires_at().0.total_cmp(&b.expires_at().0))
        })
        .collect();
    inactive.sort_by(|a, b| a.expires_at().0.total_cmp(&b.expires_at().0));
    inactive
}

/// The clock value at which the next query may be evicted, if any waits.
pub fn next_eviction(cvr: &Cvr) -> Option<TtlClock> {
    inactive_queries(&cvr.queries).first().map(InactiveQuery::expires_at)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{ClientState, QueryBody};
    use super::*;
    use crate::version::CvrVersion;

    #[test]
    fn ttls_as_clients_write_them() {
        for (text, ms) in [
            (json!("none"), 0.0),
            (json!("forever"), FOREVER),
            (json!("1.5s"), 1_500.0),
            (json!("2m"), 120_000.0),
            (json!("1h"), 3_600_000.0),
            (json!("1d"), 86_400_000.0),
            (json!("1y"), 31_536_000_000.0),
            (json!(-5), FOREVER),
            (json!(7), 7.0),
        ] {
            assert_eq!(parse_ttl(&text), Some(ms), "{text}");
        }
        assert_eq!(parse_ttl(&json!("1w")), None);
        assert_eq!(parse_ttl(&json!("é")), None);
        assert_eq!(parse_ttl(&json!(null)), None);
    }

    #[test]
    fn ttls_are_capped_at_ten_minutes() {
        assert_eq!(clamp_ttl(FOREVER), MAX_TTL_MS);
        assert_eq!(clamp_ttl(600_001.0), MAX_TTL_MS);
        assert_eq!(clamp_ttl(599_999.0), 599_999.0);
        assert_eq!(compare_ttl(FOREVER, 1e12), Ordering::Greater);
        assert_eq!(compare_ttl(1.0, FOREVER), Ordering::Less);
        assert_eq!(compare_ttl(FOREVER, FOREVER), Ordering::Equal);
    }

    fn query(id: &str, states: &[(&str, Option<f64>, f64)]) -> Arc<Query> {
        let body = QueryBody::Custom { name: "n".into(), args: "[]".into() };
        let mut q = Query::new(id.into(), body);
        for (client, inactivated, ttl_ms) in states {
            q.client_state.insert(
                (*client).into(),
                Box::new(ClientState {
                    inactivated_at: inactivated.map(TtlClock),
                    ttl_ms: *ttl_ms,
                    version: CvrVersion::empty(),
                }),
            );
        }
        Arc::new(q)
    }

    #[test]
    fn a_query_expires_when_its_last_interest_does() {
        let q = query("q", &[("a", Some(10.0), 5.0), ("b", Some(10.0), 50.0)]);
        assert!(!is_expired(&q, TtlClock(59.0)));
        assert!(is_expired(&q, TtlClock(60.0)));
        assert!(!is_expired(&query("q", &[("a", None, 0.0)]), TtlClock(1e9)));
        assert!(is_expired(&query("q", &[]), TtlClock::ZERO), "no interest, no grace");
        let internal = Query::new("lmids".into(), QueryBody::Internal { ast: Ast::default() });
        assert!(!is_expired(&internal, TtlClock(1e9)));
    }

    use super::super::Ast;

    #[test]
    fn evictions_are_planned_for_inactive_queries_only() {
        let mut cvr = Cvr::empty("g".into());
        let queries = [
            query("active", &[("a", None, 1.0), ("b", Some(0.0), 1.0)]),
            query("gone", &[]),
            query("late", &[("a", Some(10.0), 100.0), ("b", Some(90.0), 50.0)]),
            query("soon", &[("a", Some(50.0), 70.0)]),
        ];
        cvr.queries = Arc::new(queries.into_iter().map(|q| (q.id.clone(), q)).collect());
        let order: Vec<_> = inactive_queries(&cvr.queries)
            .iter()
            .map(|q| (q.id.to_string(), q.expires_at().0))
            .collect();
        assert_eq!(order, [("soon".to_owned(), 120.0), ("late".to_owned(), 140.0)]);
        assert_eq!(next_eviction(&cvr), Some(TtlClock(120.0)));
    }

    #[test]
    fn pauses_and_clock_steps_do_not_count() {
        let mut timer = TtlTimer::resume(TtlClock(100.0), 1_000.0);
        assert_eq!(timer.read(1_010.0), TtlClock(110.0));
        timer.skip_pause(9_000.0);
        assert_eq!(timer.read(9_001.0), TtlClock(111.0));
        assert_eq!(timer.read(5_000.0), TtlClock(111.0));
        assert_eq!(timer.read(5_001.0), TtlClock(112.0));
    }
}
