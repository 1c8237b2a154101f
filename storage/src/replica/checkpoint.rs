//! Keeps the WAL small although readers always hold a snapshot.
