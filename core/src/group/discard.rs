//! Operations that come to nothing: what they had in hand may be a million rows, and is left
//! behind rather than dropped ([`Waste`]).

use super::interface::Effect;
use super::machine::Cx;
use super::op::{Failure, Flushing, Stage, StepResult, Sync};
use crate::waste::Waste;

impl Stage {
    /// What it was waited for failed.
    pub(super) fn failed(self, failure: impl Into<Failure>, cx: &mut Cx<'_>) -> StepResult {
        self.discard(cx);
        Err(failure.into())
    }

    /// It is not waited for any more.
    pub(super) fn discard(self, cx: &mut Cx<'_>) {
        let mut waste = Waste::default();
        match self {
            Stage::Entering(_)
            | Stage::Loading(_)
            | Stage::Validating { .. }
            | Stage::FlushingConfig(_)
            | Stage::TransformingUnchanged { .. }
            | Stage::HydratingUnchanged { .. } => {}
            Stage::Transforming { sync, .. }
            | Stage::ReadingRows(sync)
            | Stage::CatchingUp(sync)
            | Stage::ReadingMissed(sync)
            | Stage::Hydrating(sync) => sync.discard(&mut waste),
            Stage::Taking { sync, instances, taking } => {
                // Nobody else knows yet that they are subscribed to.
                instances.into_values().for_each(|instance| cx.emit(Effect::Release(instance)));
                taking.discard(&mut waste);
                sync.discard(&mut waste);
            }
            Stage::Computing(computing) => computing.discard(&mut waste),
            Stage::Encoding(encoding) => encoding.discard(&mut waste),
            Stage::Flushing(flushing) => {
                let Flushing { poke, end, .. } = *flushing;
                poke.discard(&mut waste);
                end.discard(&mut waste);
            }
        }
        cx.let_go(waste);
    }
}

impl Sync {
    /// All of it is left behind.
    pub(super) fn discard(self: Box<Self>, waste: &mut Waste) {
        let Sync { records, missed, .. } = *self;
        records.into_slices().discard(waste);
        missed.discard(waste);
    }
}
