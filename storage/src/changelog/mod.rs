//! The replica's change log, `_zero.changeLog2`: which rows changed since a version.
