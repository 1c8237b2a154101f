//! `kill -9` in the middle of flushes: what was acknowledged is there, and what is there is one
//! flush as a whole.
