//! Timers of a group: evictions, the TTL clock, credentials (spec: view-syncer-cvr §5.6 "Expiry",
//! §6.2).

use super::interface::{Effect, Timer};
use super::machine::{Cx, Group};
use crate::cvr::next_eviction;

/// Two evictions closer than this share one update, milliseconds.
const EVICTION_SLACK_MS: f64 = 50.0;
/// An eviction timer never waits longer, milliseconds (the longest TTL).
const EVICTION_MAX_MS: f64 = 600_000.0;

/// When the timers that are set fire, wall time.
#[derive(Debug, Default)]
pub(super) struct Planned {
    pub(super) expiry_at_ms: Option<f64>,
    pub(super) maintenance_at_ms: Option<f64>,
}

impl Group {
    /// Sets the timers for what is known now.
    pub(super) fn plan_timers(&mut self, cx: &mut Cx<'_>) {
        if self.clients.is_empty() {
            return;
        }
        let clock = self.flush_times(cx.now_ms).ttl_clock;
        let expiry = self.cvr.as_ref().and_then(next_eviction).map(|at| {
            let wait = at.0 - clock.0 + EVICTION_SLACK_MS;
            cx.now_ms + wait.clamp(EVICTION_SLACK_MS, EVICTION_MAX_MS)
        });
        if expiry != self.planned.expiry_at_ms {
            self.planned.expiry_at_ms = expiry;
            cx.emit(Effect::SetTimer(Timer::Expiry, expiry.map(|at| at - cx.now_ms)));
        }
        let maintenance =
            self.contexts.next_due_ms(self.synced && self.settings.has_query_endpoint);
        if maintenance != self.planned.maintenance_at_ms {
            self.planned.maintenance_at_ms = maintenance;
            let wait = maintenance.map(|at| (at - cx.now_ms).max(0.0));
            cx.emit(Effect::SetTimer(Timer::Maintenance, wait));
        }
    }

    /// Nobody is there: clock, evictions and maintenance stand still.
    pub(super) fn pause_timers(&mut self, cx: &mut Cx<'_>) {
        for timer in [Timer::Expiry, Timer::Maintenance, Timer::TtlClock] {
            cx.emit(Effect::SetTimer(timer, None));
        }
        self.planned = Planned::default();
    }
}
