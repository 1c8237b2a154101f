//! Reference counts as bytes: pairs of LEB128 varints, query number and count (zigzag).

use zeroring_core::cvr::{QueryHash, RefCounts};

/// Appends a varint.
fn push(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Takes a varint off the front.
fn pull(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        n |= bits << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

/// Encodes counts. `number` names a query; its error is passed on.
pub(super) fn encode<E>(
    counts: &RefCounts,
    mut number: impl FnMut(&QueryHash) -> Result<i64, E>,
) -> Result<Vec<u8>, E> {
    let numbered = counts.iter().map(|(query, count)| Ok((number(query)?, count)));
    Ok(encode_numbers(&numbered.collect::<Result<Vec<_>, E>>()?))
}

/// Encodes counts whose queries are numbers already.
pub(super) fn encode_numbers(counts: &[(i64, i64)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 * counts.len());
    for (number, count) in counts {
        push(&mut out, *number as u64);
        push(&mut out, ((count << 1) ^ (count >> 63)) as u64);
    }
    out
}

/// Decodes counts as (query number, count); `None` if the bytes are damaged.
pub(super) fn decode(mut bytes: &[u8]) -> Option<Vec<(i64, i64)>> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let number = pull(&mut bytes)?;
        let zigzag = pull(&mut bytes)?;
        let count = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        out.push((i64::try_from(number).ok()?, count));
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_read_back() {
        let values = [1, 0, -1, 300, i64::MAX, i64::MIN];
        let counts: RefCounts =
            values.iter().enumerate().map(|(n, c)| (QueryHash::from(format!("{n}")), *c)).collect();
        let number = |q: &QueryHash| q.as_str().parse::<i64>().map(|n| n * 1_000_000_007);
        let bytes = encode(&counts, number).unwrap();
        let back: Vec<_> = decode(&bytes).unwrap();
        let want: Vec<_> =
            (0..).zip(values).map(|(n, c): (i64, i64)| (n * 1_000_000_007, c)).collect();
        assert_eq!(back, want);
        assert_eq!(encode(&RefCounts::of("0".into(), 1), number).unwrap().len(), 2);
    }

    #[test]
    fn damaged_bytes_are_refused() {
        for bad in [&[0x80u8][..], &[1], &[0xff; 11], &[1, 0x80]] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
    }
}
