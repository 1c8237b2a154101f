//! Scalars in binary form, as the send functions write them.

use super::text::{DAY_US, PG_EPOCH_DAYS, ms_of_pg_us, utf8};
use super::{BadValue, LiteSink, Scalar, number};

pub(super) fn scalar(scalar: Scalar, raw: &[u8], out: &mut impl LiteSink) -> Result<(), BadValue> {
    match scalar {
        Scalar::Bool => out.integer(boolean(raw)?.into()),
        Scalar::Bytea => out.blob(raw),
        Scalar::Int2 | Scalar::Int4 | Scalar::Int8 => out.integer(integer(raw)?),
        Scalar::Float8 => number(float8(raw)?, out),
        Scalar::Numeric => number(numeric(raw)?, out),
        Scalar::Date => number(date(raw)?, out),
        Scalar::Timestamp | Scalar::TimestampTz => number(timestamp(raw)?, out),
        Scalar::Time => out.integer(fixed::<8>("time", raw).map(i64::from_be_bytes)? / 1000),
        Scalar::TimeTz => out.integer(time_tz(raw)?),
        Scalar::Uuid => out.text(uuid(raw, &mut [0; 36])?),
        Scalar::Jsonb => out.text(jsonb(raw)?),
        Scalar::Json | Scalar::Text => out.text(utf8(raw)?),
        Scalar::Float4 | Scalar::Other => return Err(unreadable(raw)),
    }
    Ok(())
}

/// Asked for a type that is copied in text form.
pub(super) fn unreadable(raw: &[u8]) -> BadValue {
    BadValue::new("type that is read in binary form", raw)
}

fn fixed<const N: usize>(what: &'static str, raw: &[u8]) -> Result<[u8; N], BadValue> {
    raw.try_into().map_err(|_| BadValue::new(what, raw))
}

pub(super) fn boolean(raw: &[u8]) -> Result<bool, BadValue> {
    match raw {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(BadValue::new("boolean", raw)),
    }
}

pub(super) fn integer(raw: &[u8]) -> Result<i64, BadValue> {
    match *raw {
        [a, b] => Ok(i16::from_be_bytes([a, b]).into()),
        [a, b, c, d] => Ok(i32::from_be_bytes([a, b, c, d]).into()),
        [a, b, c, d, e, f, g, h] => Ok(i64::from_be_bytes([a, b, c, d, e, f, g, h])),
        _ => Err(BadValue::new("integer", raw)),
    }
}

pub(super) fn float8(raw: &[u8]) -> Result<f64, BadValue> {
    fixed("double", raw).map(f64::from_be_bytes)
}

pub(super) fn date(raw: &[u8]) -> Result<f64, BadValue> {
    Ok(match i32::from_be_bytes(fixed("date", raw)?) {
        i32::MAX => f64::INFINITY,
        i32::MIN => f64::NEG_INFINITY,
        days => (i64::from(days) + PG_EPOCH_DAYS) as f64 * 86_400_000.0,
    })
}

pub(super) fn timestamp(raw: &[u8]) -> Result<f64, BadValue> {
    Ok(match i64::from_be_bytes(fixed("timestamp", raw)?) {
        i64::MAX => f64::INFINITY,
        i64::MIN => f64::NEG_INFINITY,
        us => ms_of_pg_us(us),
    })
}

/// The zone is seconds west.
pub(super) fn time_tz(raw: &[u8]) -> Result<i64, BadValue> {
    let raw = fixed::<12>("time with zone", raw)?;
    let us = i64::from_be_bytes([raw[0], raw[1], raw[2], raw[3], raw[4], raw[5], raw[6], raw[7]]);
    let west = i32::from_be_bytes([raw[8], raw[9], raw[10], raw[11]]);
    let utc = us.saturating_add(i64::from(west) * 1_000_000);
    Ok(utc.rem_euclid(DAY_US) / 1000)
}

pub(super) fn uuid<'b>(raw: &[u8], text: &'b mut [u8; 36]) -> Result<&'b str, BadValue> {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = fixed::<16>("uuid", raw)?;
    let mut at = 0;
    for (i, b) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text[at] = b'-';
            at += 1;
        }
        text[at] = HEX[usize::from(b >> 4)];
        text[at + 1] = HEX[usize::from(b & 15)];
        at += 2;
    }
    utf8(text)
}

pub(super) fn jsonb(raw: &[u8]) -> Result<&str, BadValue> {
    match raw {
        [1, json @ ..] => utf8(json),
        _ => Err(BadValue::new("jsonb of version 1", raw)),
    }
}

const NUMERIC_NEGATIVE: u16 = 0x4000;
const NUMERIC_NAN: u16 = 0xC000;
const NUMERIC_INFINITY: u16 = 0xD000;
const NUMERIC_MINUS_INFINITY: u16 = 0xF000;

/// Powers of ten that a double holds exactly.
const EXACT_POWERS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
];

/// Base-10,000 digits, the first of weight `weight`: the double nearest to their value.
pub(super) fn numeric(raw: &[u8]) -> Result<f64, BadValue> {
    let bad = || BadValue::new("numeric", raw);
    let (head, digits) = raw.split_at_checked(8).ok_or_else(bad)?;
    let word = |i: usize| u16::from_be_bytes([head[2 * i], head[2 * i + 1]]);
    let (count, weight, sign) = (word(0), word(1).cast_signed(), word(2));
    match sign {
        0 | NUMERIC_NEGATIVE => {}
        NUMERIC_NAN => return Ok(f64::NAN),
        NUMERIC_INFINITY => return Ok(f64::INFINITY),
        NUMERIC_MINUS_INFINITY => return Ok(f64::NEG_INFINITY),
        _ => return Err(bad()),
    }
    if digits.len() != usize::from(count) * 2 {
        return Err(bad());
    }
    let digits = || digits.chunks_exact(2).map(|d| u64::from(u16::from_be_bytes([d[0], d[1]])));
    if digits().any(|d| d > 9999) {
        return Err(bad());
    }
    let exponent = (i32::from(weight) - i32::from(count) + 1) * 4;
    let magnitude =
        if count <= 4 { small(digits().fold(0, |n, d| n * 10_000 + d), exponent) } else { None };
    let magnitude = match magnitude {
        Some(m) => m,
        None => {
            let mut text = String::with_capacity(usize::from(count) * 4 + 8);
            for d in digits() {
                text.push_str(&format!("{d:04}"));
            }
            text.push_str(&format!("e{exponent}"));
            text.parse().map_err(|_| bad())?
        }
    };
    Ok(if sign == NUMERIC_NEGATIVE { -magnitude } else { magnitude })
}

/// Exact operands and one rounding give the nearest double.
fn small(mantissa: u64, exponent: i32) -> Option<f64> {
    if mantissa > 1 << 53 {
        return None;
    }
    let power = *EXACT_POWERS.get(exponent.unsigned_abs() as usize)?;
    let mantissa = mantissa as f64;
    Some(if exponent < 0 { mantissa / power } else { mantissa * power })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(digits: &[u16], weight: i16, sign: u16) -> Vec<u8> {
        let mut out = vec![];
        out.extend((digits.len() as u16).to_be_bytes());
        out.extend(weight.to_be_bytes());
        out.extend(sign.to_be_bytes());
        out.extend([0, 0]);
        digits.iter().for_each(|d| out.extend(d.to_be_bytes()));
        out
    }

    #[test]
    fn numerics_are_the_nearest_double() {
        for (digits, weight, sign, value) in [
            (&[][..], 0, 0, 0.0),
            (&[1], 0, 0, 1.0),
            (&[12, 3400], 0, 0x4000, -12.34),
            // The values that the original's decoder gets wrong.
            (&[12, 3456, 7890, 1234, 5670], -1, 0, 0.0012345678901234567),
            (&[1234, 5678, 9012, 3456, 7000], -2, 0, 0.000012345678901234567),
            (&[9007, 1992, 5474, 992], 3, 0, 9_007_199_254_740_992.0),
            (&[9007, 1992, 5474, 993], 3, 0, 9_007_199_254_740_992.0),
            (&[1], 76, 0, 1e304),
            (&[1], 80, 0, f64::INFINITY),
            (&[1], -90, 0, 0.0),
        ] {
            assert_eq!(numeric(&encode(digits, weight, sign)), Ok(value), "{digits:?}");
        }
        assert!(numeric(&encode(&[], 0, NUMERIC_NAN)).unwrap().is_nan());
        for bad in [&b""[..], &[0; 7], &encode(&[10_000], 0, 0), &encode(&[1, 2], 0, 0)[..10]] {
            assert!(numeric(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn uuids() {
        let bytes: Vec<u8> = (0..16).map(|b| b * 16 + 15 - b).collect();
        assert_eq!(uuid(&bytes, &mut [0; 36]).unwrap(), "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0");
        assert!(uuid(&bytes[1..], &mut [0; 36]).is_err());
    }
}
