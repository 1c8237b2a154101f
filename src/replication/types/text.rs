//! Scalars in text form, as the output functions write them with `DateStyle=ISO` and
//! `bytea_output=hex`.

use zeroring_net::pg::row::unhex;

use super::{BadValue, LiteSink, Scalar, number};

pub(super) const DAY_US: i64 = 86_400_000_000;
const SECOND_US: i64 = 1_000_000;
/// Last years of dates and timestamps.
const MAX_YEAR: i64 = 5_874_897;
const MAX_TIMESTAMP_YEAR: i64 = 294_276;
/// Days from 1970-01-01 to 2000-01-01.
pub(super) const PG_EPOCH_DAYS: i64 = 10_957;

pub(super) fn scalar(scalar: Scalar, raw: &[u8], out: &mut impl LiteSink) -> Result<(), BadValue> {
    match scalar {
        Scalar::Bool => out.integer(boolean(raw)?.into()),
        Scalar::Bytea => out.blob(&bytea(raw)?),
        Scalar::Int2 | Scalar::Int4 | Scalar::Int8 => out.integer(integer(raw)?),
        Scalar::Float4 | Scalar::Float8 | Scalar::Numeric => number(float(raw)?, out),
        Scalar::Date => number(date(raw)?, out),
        Scalar::Timestamp | Scalar::TimestampTz => number(timestamp(raw)?, out),
        Scalar::Time | Scalar::TimeTz => out.integer(time(raw)?),
        Scalar::Json | Scalar::Jsonb | Scalar::Uuid | Scalar::Text | Scalar::Other => {
            out.text(utf8(raw)?);
        }
    }
    Ok(())
}

pub(super) fn utf8(raw: &[u8]) -> Result<&str, BadValue> {
    std::str::from_utf8(raw).map_err(|_| BadValue::new("UTF-8 text", raw))
}

pub(super) fn boolean(raw: &[u8]) -> Result<bool, BadValue> {
    match raw {
        b"t" => Ok(true),
        b"f" => Ok(false),
        _ => Err(BadValue::new("boolean", raw)),
    }
}

pub(super) fn bytea(raw: &[u8]) -> Result<Vec<u8>, BadValue> {
    raw.strip_prefix(b"\\x").and_then(unhex).ok_or_else(|| BadValue::new("bytea", raw))
}

pub(super) fn integer(raw: &[u8]) -> Result<i64, BadValue> {
    utf8(raw)?.parse().map_err(|_| BadValue::new("integer", raw))
}

pub(super) fn float(raw: &[u8]) -> Result<f64, BadValue> {
    // Postgres writes NaN, Infinity and -Infinity; Rust reads them.
    utf8(raw)?.parse().map_err(|_| BadValue::new("number", raw))
}

/// Days from 1970-01-01 of a date of the proleptic Gregorian calendar. Year 0 is 1 BC.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let shifted = if month <= 2 { year - 1 } else { year };
    let era = shifted.div_euclid(400);
    let year_of_era = shifted.rem_euclid(400);
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Reads numbers and separators off the front of a text.
struct Scan<'a> {
    rest: &'a [u8],
}

impl Scan<'_> {
    fn eat(&mut self, byte: u8) -> bool {
        match self.rest.split_first() {
            Some((&b, rest)) if b == byte => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// Up to `max` digits, at least one.
    fn number(&mut self, max: usize) -> Option<i64> {
        let len = self.rest.iter().take(max).take_while(|b| b.is_ascii_digit()).count();
        let (digits, rest) = self.rest.split_at(len);
        self.rest = rest;
        let value = digits.iter().fold(0i64, |n, d| n * 10 + i64::from(d - b'0'));
        (len > 0).then_some(value)
    }

    /// `YYYY-MM-DD` as days from 1970-01-01, before it is known whether it is BC.
    fn date(&mut self) -> Option<(i64, i64, i64)> {
        let year = self.number(7).filter(|y| *y <= MAX_YEAR)?;
        let month = self.eat(b'-').then(|| self.number(2))??;
        let day = self.eat(b'-').then(|| self.number(2))??;
        ((1..=12).contains(&month) && (1..=31).contains(&day)).then_some((year, month, day))
    }

    /// `HH:MM:SS[.ffffff]` in microseconds.
    fn time(&mut self) -> Option<i64> {
        let hours = self.number(2)?;
        let minutes = self.eat(b':').then(|| self.number(2))??;
        let seconds = self.eat(b':').then(|| self.number(2))??;
        let mut us = ((hours * 60 + minutes) * 60 + seconds) * SECOND_US;
        if self.eat(b'.') {
            let before = self.rest.len();
            let fraction = self.number(6)?;
            let digits = before - self.rest.len();
            us += fraction * 10i64.pow((6 - digits) as u32);
        }
        Some(us)
    }

    /// `±HH[:MM[:SS]]` in microseconds east; 0 if there is none.
    fn zone(&mut self) -> Option<i64> {
        let sign = match self.rest.first() {
            Some(b'+') => 1,
            Some(b'-') => -1,
            _ => return Some(0),
        };
        self.rest = &self.rest[1..];
        let mut seconds = self.number(2)? * 3600;
        if self.eat(b':') {
            seconds += self.number(2)? * 60;
        }
        if self.eat(b':') {
            seconds += self.number(2)?;
        }
        Some(sign * seconds * SECOND_US)
    }

    /// An optional ` BC` and the end.
    fn end(&mut self, year: i64) -> Option<i64> {
        match self.rest {
            b"" => Some(year),
            b" BC" => Some(1 - year),
            _ => None,
        }
    }
}

fn infinity(raw: &[u8]) -> Option<f64> {
    match raw {
        b"infinity" => Some(f64::INFINITY),
        b"-infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

/// Milliseconds since the epoch.
pub(super) fn date(raw: &[u8]) -> Result<f64, BadValue> {
    if let Some(infinity) = infinity(raw) {
        return Ok(infinity);
    }
    let mut scan = Scan { rest: raw };
    let parse = |scan: &mut Scan<'_>| {
        let (year, month, day) = scan.date()?;
        let year = scan.end(year)?;
        Some(days_from_civil(year, month, day) as f64 * 86_400_000.0)
    };
    parse(&mut scan).ok_or_else(|| BadValue::new("date", raw))
}

/// Milliseconds since the epoch.
pub(super) fn timestamp(raw: &[u8]) -> Result<f64, BadValue> {
    if let Some(infinity) = infinity(raw) {
        return Ok(infinity);
    }
    let mut scan = Scan { rest: raw };
    let parse = |scan: &mut Scan<'_>| {
        let (year, month, day) = scan.date()?;
        let time = scan.eat(b' ').then(|| scan.time())??;
        let zone = scan.zone()?;
        let year = scan.end(year).filter(|_| year <= MAX_TIMESTAMP_YEAR)?;
        Some((days_from_civil(year, month, day) - PG_EPOCH_DAYS) * DAY_US + time - zone)
    };
    parse(&mut scan).map(ms_of_pg_us).ok_or_else(|| BadValue::new("timestamp", raw))
}

/// Milliseconds from the Unix epoch to Postgres'.
const PG_EPOCH_MS: i64 = 946_684_800_000;

/// The double nearest to the Unix milliseconds of microseconds since 2000. (Those since 1970 would
/// not fit 64 bits for the last years that Postgres knows.)
pub(super) fn ms_of_pg_us(us: i64) -> f64 {
    let (ms, rest) = (us.div_euclid(1000) + PG_EPOCH_MS, us.rem_euclid(1000));
    // Below this, the microseconds are exact and there is one rounding. Beyond, a double cannot
    // tell microseconds anyway.
    const EXACT_MS: i64 = (1 << 53) / 1000;
    if ms.abs() < EXACT_MS {
        (ms * 1000 + rest) as f64 / 1000.0
    } else {
        ms as f64 + rest as f64 / 1000.0
    }
}

/// Milliseconds since midnight, truncated; with a zone in UTC, below a day.
pub(super) fn time(raw: &[u8]) -> Result<i64, BadValue> {
    let mut scan = Scan { rest: raw };
    let parse = |scan: &mut Scan<'_>| {
        let us = scan.time()?;
        if scan.rest.is_empty() {
            return Some(us / 1000);
        }
        let zone = scan.zone()?;
        scan.rest.is_empty().then(|| (us - zone).rem_euclid(DAY_US) / 1000)
    };
    parse(&mut scan).ok_or_else(|| BadValue::new("time", raw))
}
