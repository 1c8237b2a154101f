//! Where the app is called, and with which headers.

use url::Url;
use urlpattern::{UrlPattern, UrlPatternInit, UrlPatternMatchInput, UrlPatternOptions};
use zeroring_core::group::{Credentials, Target};
use zeroring_core::protocol::error::{ApiFailure, CallReason};

use crate::options::config::Endpoint;

/// Query parameters that this server adds; an app's URL must not have them.
const RESERVED_PARAMS: [&str; 2] = ["schema", "appID"];

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// An entry of the list is no URLPattern.
    #[error("{option}: \"{pattern}\" is not a valid URL pattern: {cause}")]
    Pattern {
        /// The option.
        option: &'static str,
        /// The entry.
        pattern: String,
        /// What is wrong.
        cause: String,
    },
}

/// What an endpoint is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointKind {
    /// `ZERO_QUERY_URL`: what named queries mean.
    Query,
    /// `ZERO_MUTATE_URL`: custom mutators.
    Mutate,
}

impl EndpointKind {
    /// The option with its URLs.
    pub fn option(self) -> &'static str {
        match self {
            EndpointKind::Query => "ZERO_QUERY_URL",
            EndpointKind::Mutate => "ZERO_MUTATE_URL",
        }
    }

    /// What a client asked for in place of it.
    fn of(self, credentials: &Credentials) -> &Target {
        match self {
            EndpointKind::Query => &credentials.query,
            EndpointKind::Mutate => &credentials.mutate,
        }
    }
}

/// An endpoint of the app.
#[derive(Debug)]
pub struct AppEndpoint {
    kind: EndpointKind,
    settings: Endpoint,
    patterns: Vec<UrlPattern>,
    /// `schema={appID}_{shardNum}&appID={appID}`.
    added_query: String,
}

impl AppEndpoint {
    /// The endpoint of these settings; `None` if there is none.
    ///
    /// # Errors
    /// [`EndpointError`]: better now than at a client's first connection.
    pub fn new(
        kind: EndpointKind,
        settings: &Endpoint,
        app_id: &str,
        shard_num: u32,
    ) -> Result<Option<AppEndpoint>, EndpointError> {
        if settings.urls.is_empty() {
            return Ok(None);
        }
        let patterns =
            settings.urls.iter().map(|url| pattern(kind, url)).collect::<Result<Vec<_>, _>>()?;
        let added_query = format!("schema={app_id}_{shard_num}&appID={app_id}");
        Ok(Some(AppEndpoint { kind, settings: settings.clone(), patterns, added_query }))
    }

    /// The URL of a request, with our parameters. `doing` completes "Failed to …".
    ///
    /// # Errors
    /// The connection's own URL is not allowed, or unusable.
    pub(super) fn target(
        &self,
        credentials: &Credentials,
        doing: &str,
    ) -> Result<String, ApiFailure> {
        let internal = |text: String| ApiFailure::call(CallReason::Internal, text);
        let wanted = match &self.kind.of(credentials).url {
            Some(url) => &**url,
            None => self.settings.urls.first().map(String::as_str).unwrap_or_default(),
        };
        let option = self.kind.option();
        let refused =
            || internal(format!("URL \"{wanted}\" is not allowed by the {option} configuration"));
        let url = Url::parse(wanted).map_err(|_| refused())?;
        let allowed = self
            .patterns
            .iter()
            .any(|pattern| pattern.test(UrlPatternMatchInput::Url(url.clone())).unwrap_or(false));
        if !allowed {
            return Err(refused());
        }
        if let Some((name, _)) = url.query_pairs().find(|(n, _)| RESERVED_PARAMS.contains(&&**n)) {
            return Err(internal(format!(
                "Failed to {doing}: The push URL cannot contain the reserved query param \
                 \"{name}\""
            )));
        }
        let mut url = url;
        let query = match url.query().filter(|q| !q.is_empty()) {
            Some(own) => format!("{own}&{}", self.added_query),
            None => self.added_query.clone(),
        };
        url.set_query(Some(&query));
        url.set_fragment(None);
        Ok(url.into())
    }

    /// Headers of a request. The server's own are set last and replace others of the same name,
    /// whatever its case.
    pub(super) fn headers(&self, credentials: &Credentials) -> Vec<(String, String)> {
        let mut headers: Vec<(String, String)> = Vec::new();
        let mut set = |name: &str, value: &str| {
            headers.retain(|(known, _)| !known.eq_ignore_ascii_case(name));
            headers.push((name.to_owned(), value.to_owned()));
        };
        let allowed =
            |list: &[String], name: &str| list.iter().any(|n| n.eq_ignore_ascii_case(name));
        for (name, value) in &self.kind.of(credentials).headers {
            if allowed(&self.settings.allowed_client_headers, name) {
                set(name, value);
            }
        }
        for (name, value) in credentials.request_headers.iter() {
            if allowed(&self.settings.allowed_request_headers, name) {
                set(name, value);
            }
        }
        set("Content-Type", "application/json");
        if let Some(key) = &self.settings.api_key {
            set("X-Api-Key", key.expose());
        }
        if let Some(token) = &credentials.token {
            set("Authorization", &format!("Bearer {token}"));
        }
        if self.settings.forward_cookies
            && let Some(cookie) = credentials.request_headers.get("cookie")
        {
            set("Cookie", cookie);
        }
        if let Some(origin) = credentials.request_headers.get("origin") {
            set("Origin", origin);
        }
        headers
    }
}

fn pattern(kind: EndpointKind, text: &str) -> Result<UrlPattern, EndpointError> {
    let (option, pattern) = (kind.option(), text.to_owned());
    let err = |cause: String| EndpointError::Pattern { option, pattern: pattern.clone(), cause };
    let mut init = UrlPatternInit::parse_constructor_string::<regex::Regex>(text, None)
        .map_err(|e| err(e.to_string()))?;
    // What a pattern does not say about search and hash is free.
    init.search.get_or_insert_with(|| "*".to_owned());
    init.hash.get_or_insert_with(|| "*".to_owned());
    <UrlPattern>::parse(init, UrlPatternOptions::default()).map_err(|e| err(e.to_string()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::options::config::Secret;

    fn endpoint(urls: &[&str]) -> AppEndpoint {
        of_kind(EndpointKind::Query, urls)
    }

    fn of_kind(kind: EndpointKind, urls: &[&str]) -> AppEndpoint {
        let settings = Endpoint {
            urls: urls.iter().map(|u| (*u).to_owned()).collect(),
            api_key: Some(Secret::new("k")),
            forward_cookies: true,
            allowed_client_headers: vec!["x-app".into(), "authorization".into()],
            allowed_request_headers: vec!["x-trace".into()],
        };
        AppEndpoint::new(kind, &settings, "zero", 0).unwrap().unwrap()
    }

    fn with_url(url: &str) -> Credentials {
        let query = Target { url: Some(url.into()), ..Target::default() };
        Credentials { query, ..Credentials::default() }
    }

    #[test]
    fn the_first_url_is_the_default_and_gets_our_parameters() {
        let e = endpoint(&["https://app.example/q?a=1", "https://other.example/*"]);
        assert_eq!(
            e.target(&Credentials::default(), "transform queries").unwrap(),
            "https://app.example/q?a=1&schema=zero_0&appID=zero"
        );
    }

    #[test]
    fn other_urls_must_match_a_pattern() {
        let e = endpoint(&["https://app.example/q", "https://*.branch.example/:name/q"]);
        for ok in ["https://app.example/q", "https://x.branch.example/dev/q?page=2"] {
            assert!(e.target(&with_url(ok), "transform queries").is_ok(), "{ok}");
        }
        for bad in ["https://app.example/q2", "http://app.example/q", "https://evil.example/", "x"]
        {
            let failure = e.target(&with_url(bad), "transform queries").unwrap_err();
            assert_eq!(
                failure.message,
                format!("URL \"{bad}\" is not allowed by the ZERO_QUERY_URL configuration")
            );
        }
    }

    #[test]
    fn reserved_parameters_are_refused_before_any_request() {
        let e = endpoint(&["https://app.example/q"]);
        let failure = e.target(&with_url("https://app.example/q?schema=x"), "validate queries");
        assert_eq!(
            failure.unwrap_err().message,
            "Failed to validate queries: The push URL cannot contain the reserved query param \
             \"schema\""
        );
    }

    #[test]
    fn a_bad_pattern_is_found_at_start() {
        let settings =
            Endpoint { urls: vec!["https://app.example/:(".into()], ..Endpoint::default() };
        for kind in [EndpointKind::Query, EndpointKind::Mutate] {
            let error = AppEndpoint::new(kind, &settings, "zero", 0).unwrap_err().to_string();
            assert!(error.contains("https://app.example/:("), "{error}");
            assert!(error.starts_with(kind.option()), "{error}");
        }
    }

    #[test]
    fn each_endpoint_looks_at_its_own_target() {
        let headers = [("x-app".to_owned(), "1".to_owned())];
        let mutate = Target { url: Some("https://evil.example/".into()), headers: headers.into() };
        let credentials = Credentials { mutate, ..Credentials::default() };
        let e = endpoint(&["https://app.example/"]);
        assert!(e.target(&credentials, "transform queries").is_ok());
        assert_eq!(e.headers(&credentials).len(), 2);
        let e = of_kind(EndpointKind::Mutate, &["https://app.example/"]);
        assert_eq!(
            e.target(&credentials, "push").unwrap_err().message,
            "URL \"https://evil.example/\" is not allowed by the ZERO_MUTATE_URL configuration"
        );
        assert_eq!(e.headers(&credentials).len(), 3);
    }

    #[test]
    fn headers_are_filtered_and_ours_win() {
        let e = endpoint(&["https://app.example/q"]);
        let list = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
        };
        let credentials = Credentials {
            token: Some("tok".into()),
            query: Target {
                headers: list(&[("X-App", "1"), ("X-Secret", "2"), ("Authorization", "no")]),
                url: None,
            },
            request_headers: Arc::new(list(&[
                ("cookie", "c=1"),
                ("origin", "https://site.example"),
                ("x-trace", "t"),
                ("x-other", "o"),
            ])),
            ..Credentials::default()
        };
        let headers = e.headers(&credentials);
        let expected = [
            ("X-App", "1"),
            ("x-trace", "t"),
            ("Content-Type", "application/json"),
            ("X-Api-Key", "k"),
            ("Authorization", "Bearer tok"),
            ("Cookie", "c=1"),
            ("Origin", "https://site.example"),
        ];
        assert_eq!(headers, expected.map(|(n, v)| (n.to_owned(), v.to_owned())));
    }
}
