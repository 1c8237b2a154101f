//! Versions: LexiVersion, state versions, CVR versions and cookies.
//!
//! Spec: view-syncer-cvr §1.2, replication §3.6.

use std::cmp::Ordering;
use std::fmt;

use crate::text::Text;

/// What is wrong with a version string.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// Not a LexiVersion.
    #[error("Invalid LexiVersion: {0}")]
    Lexi(String),
    /// Not `state` or `state:config`.
    #[error("Invalid version string: {0}")]
    Cookie(String),
}

const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// Encodes `n` so that byte order is numeric order: base-36 digits behind one digit that counts
/// them (less one).
pub fn lexi_encode(n: u64) -> String {
    let mut digits = [0u8; 13];
    let mut at = digits.len();
    let mut rest = n;
    loop {
        at -= 1;
        digits[at] = DIGITS[(rest % 36) as usize];
        rest /= 36;
        if rest == 0 {
            break;
        }
    }
    let count = digits.len() - at;
    let mut out = String::with_capacity(count + 1);
    out.push(DIGITS[count - 1] as char);
    out.extend(digits[at..].iter().map(|&d| d as char));
    out
}

/// Decodes a LexiVersion.
///
/// # Errors
/// [`VersionError::Lexi`] if the text is no LexiVersion or above 2^64 − 1.
pub fn lexi_decode(s: &str) -> Result<u64, VersionError> {
    let err = || VersionError::Lexi(s.to_owned());
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(u64::from(b - b'0')),
        b'a'..=b'z' => Some(u64::from(b - b'a') + 10),
        _ => None,
    };
    let bytes = s.as_bytes();
    let (&prefix, digits) = bytes.split_first().ok_or_else(err)?;
    if digits.is_empty() || digit(prefix).ok_or_else(err)? != digits.len() as u64 - 1 {
        return Err(err());
    }
    digits.iter().try_fold(0u64, |n, &b| {
        n.checked_mul(36).and_then(|n| n.checked_add(digit(b)?)).ok_or_else(err)
    })
}

/// A replica's version: `major` or `major.minor`, both LexiVersions, compared as bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StateVersion(Text);

impl StateVersion {
    /// The lowest version, `00`.
    pub fn zero() -> StateVersion {
        StateVersion(Text::from("00"))
    }

    /// The version of a Postgres LSN (or of another 64-bit watermark).
    pub fn from_lsn(lsn: u64) -> StateVersion {
        StateVersion(lexi_encode(lsn).into())
    }

    /// Parses and checks a version.
    ///
    /// # Errors
    /// [`VersionError`] if a part is no LexiVersion.
    pub fn parse(s: &str) -> Result<StateVersion, VersionError> {
        let mut parts = s.split('.');
        lexi_decode(parts.next().unwrap_or_default())?;
        if let Some(minor) = parts.next() {
            lexi_decode(minor)?;
        }
        match parts.next() {
            None => Ok(StateVersion(Text::from(s))),
            Some(_) => Err(VersionError::Cookie(s.to_owned())),
        }
    }

    /// The number of the major part: the LSN.
    ///
    /// # Errors
    /// [`VersionError`] never for a parsed version.
    pub fn lsn(&self) -> Result<u64, VersionError> {
        lexi_decode(self.0.split('.').next().unwrap_or_default())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for StateVersion {
    fn default() -> Self {
        StateVersion::zero()
    }
}
impl fmt::Display for StateVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for StateVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A version of a client group's CVR: the state version and how often the configuration changed
/// at it. Ordered by state version, then number.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct CvrVersion {
    /// The replica version.
    pub state: StateVersion,
    /// Configuration changes at this state version; 0 is not printed.
    pub config: u64,
}

impl CvrVersion {
    /// The version of a CVR that was never written, cookie `00`.
    pub fn empty() -> CvrVersion {
        CvrVersion::default()
    }

    /// The next version at the same state.
    pub fn one_after(&self) -> CvrVersion {
        CvrVersion { state: self.state.clone(), config: self.config + 1 }
    }

    /// The cookie: wire form, poke id and database form.
    pub fn cookie(&self) -> String {
        if self.config == 0 {
            self.state.to_string()
        } else {
            format!("{}:{}", self.state, lexi_encode(self.config))
        }
    }

    /// Parses a cookie.
    ///
    /// # Errors
    /// [`VersionError`] naming the text.
    pub fn parse(s: &str) -> Result<CvrVersion, VersionError> {
        let mut parts = s.split(':');
        let state = StateVersion::parse(parts.next().unwrap_or_default())?;
        let config = match parts.next() {
            None => 0,
            Some(c) => lexi_decode(c)?,
        };
        if parts.next().is_some() || config > (1 << 53) - 1 {
            return Err(VersionError::Cookie(s.to_owned()));
        }
        Ok(CvrVersion { state, config })
    }
}

impl PartialOrd for CvrVersion {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for CvrVersion {
    fn cmp(&self, other: &Self) -> Ordering {
        self.state.cmp(&other.state).then(self.config.cmp(&other.config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lexi_vectors_of_the_spec() {
        for (n, s) in [
            (0, "00"),
            (9, "09"),
            (10, "0a"),
            (35, "0z"),
            (36, "110"),
            (46655, "2zzz"),
            (46656, "31000"),
            (22_020_400, "4d3z1s"),
            (9_007_199_254_740_991, "a2gosa7pa2gv"),
        ] {
            assert_eq!(lexi_encode(n), s);
            assert_eq!(lexi_decode(s), Ok(n));
        }
        assert_eq!(lexi_decode(&lexi_encode(u64::MAX)), Ok(u64::MAX));
        for bad in ["", "0", "1a", "10", "zz", "0A", "c3w5e11264sgsg"] {
            assert!(lexi_decode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cookies_of_the_spec() {
        let version =
            |state: &str, config| CvrVersion { state: StateVersion::parse(state).unwrap(), config };
        for (v, s) in [
            (version("00", 0), "00"),
            (version("00", 1), "00:01"),
            (version("5nbqa2w", 9), "5nbqa2w:09"),
            (version("5nbqa2w.01", 36), "5nbqa2w.01:110"),
            (version("00", (1 << 53) - 1), "00:a2gosa7pa2gv"),
        ] {
            assert_eq!((v.cookie().as_str(), CvrVersion::parse(s)), (s, Ok(v)));
        }
        for bad in [
            "",
            ":",
            "1a",
            "00:",
            ":01",
            "00:01:02",
            "a:b:c",
            "00:1",
            "00.",
            "00.01.02",
            "00:a2gosa7pa2gw",
        ] {
            assert!(CvrVersion::parse(bad).is_err(), "{bad}");
        }
        assert!(version("2abc.01", 0) > version("2abc", 1), "structural, not textual");
        assert!(
            version("2abc", 10) > version("2abc", 9) && version("2abd", 0) > version("2abc", 9)
        );
        assert!(Some(CvrVersion::empty()) > None);
        assert_eq!(CvrVersion::empty().cookie(), "00");
        assert_eq!(version("2abc", 0).one_after(), version("2abc", 1));
        assert_eq!(version("2abc", 10).one_after(), version("2abc", 11));
    }

    #[test]
    fn state_versions_order_as_bytes() {
        let v = ["2abc", "2abc.00", "2abc.01", "2abd"].map(|s| StateVersion::parse(s).unwrap());
        assert!(v.is_sorted());
    }
}
