//! The admin password: for `/statz` and the inspector (spec: operations §3.3).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::options::{Options, Secret};

/// Who may see statistics and use the inspector.
#[derive(Debug, Clone, Default)]
pub struct AdminRule {
    password: Option<Secret>,
    development: bool,
}

impl AdminRule {
    /// The rule of these options.
    pub fn new(options: &Options) -> AdminRule {
        let password = options.admin_password.clone().filter(|p| !p.expose().is_empty());
        AdminRule { password, development: options.development }
    }

    /// Whether a password is right. Without a configured one only development mode lets in, and
    /// only who gives none either.
    pub fn allows(&self, given: Option<&str>) -> bool {
        let given = given.filter(|text| !text.is_empty());
        match (&self.password, given) {
            (None, None) if self.development => true,
            (None, _) => {
                tracing::warn!("No admin password set; denying access");
                false
            }
            (Some(password), given) => {
                let right = equal(password.expose(), given.unwrap_or(""));
                if !right {
                    tracing::warn!("Invalid admin password");
                }
                right
            }
        }
    }

    /// Whether an `Authorization` header of HTTP's basic scheme is right; any user name.
    pub fn allows_basic(&self, authorization: Option<&str>) -> bool {
        let decoded = authorization.and_then(|header| {
            let (scheme, encoded) = header.trim().split_once(' ')?;
            let decoded = scheme
                .eq_ignore_ascii_case("basic")
                .then(|| STANDARD.decode(encoded.trim()).ok())??;
            String::from_utf8(decoded).ok()
        });
        let password = decoded.as_deref().and_then(|text| Some(text.split_once(':')?.1));
        self.allows(password)
    }
}

/// Compares in a time that depends on the given text's length only.
fn equal(secret: &str, given: &str) -> bool {
    let secret = secret.as_bytes();
    let mut difference = u8::from(secret.len() != given.len());
    for (i, byte) in given.bytes().enumerate() {
        difference |= byte ^ secret.get(i % secret.len().max(1)).copied().unwrap_or(0);
    }
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(password: Option<&str>, development: bool) -> AdminRule {
        AdminRule { password: password.map(Secret::new), development }
    }

    #[test]
    fn passwords() {
        let production = rule(Some("sécret"), false);
        assert!(production.allows(Some("sécret")));
        for wrong in
            [None, Some(""), Some("secret"), Some("sécre"), Some("sécretsécret"), Some("sécrets")]
        {
            assert!(!production.allows(wrong), "{wrong:?}");
        }
        assert!(!rule(None, false).allows(None));
        assert!(!rule(None, false).allows(Some("x")));
        assert!(rule(None, true).allows(None));
        assert!(!rule(None, true).allows(Some("x")));
        // A configured password counts in development too.
        assert!(!rule(Some("pw"), true).allows(None));
        assert!(rule(Some("pw"), true).allows(Some("pw")));
    }

    #[test]
    fn basic_authorization() {
        let rule = rule(Some("a:b"), false);
        let header = |text: &str| format!("Basic {}", STANDARD.encode(text));
        assert!(rule.allows_basic(Some(&header("anyone:a:b"))));
        assert!(rule.allows_basic(Some(&header(":a:b").replace("Basic", "basic"))));
        for wrong in ["", "Basic", "Basic !!", "Bearer a:b", &header("a"), &header("x:a")] {
            assert!(!rule.allows_basic(Some(wrong)), "{wrong}");
        }
        assert!(!rule.allows_basic(None));
    }
}
