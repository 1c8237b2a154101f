//! The net effect of a transaction, row by row.
