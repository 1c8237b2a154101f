//! Where queries are asked for, and with which headers.

use url::Url;
use urlpattern::{UrlPattern, UrlPatternInit, UrlPatternMatchInput, UrlPatternOptions};
use zeroring_core::group::Credentials;
use zeroring_core::protocol::error::{ApiFailure, CallReason};

use crate::options::config::Endpoint;

/// Query parameters that this server adds; an app's URL must not have them.
const RESERVED_PARAMS: [&str; 2] = ["schema", "appID"];

/// A setting that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// An entry of the list is no URLPattern.
    #[error("ZERO_QUERY_URL: \"{pattern}\" is not a valid URL pattern: {cause}")]
    Pattern {
        /// The entry.
        pattern: String,
        /// What is wrong.
        cause: String,
    },
}

/// The app's query endpoint.
#[derive(Debug)]
pub struct QueryEndpoint {
    settings: Endpoint,
    patterns: Vec<UrlPattern>,
    /// `schema={appID}_{shardNum}&appID={appID}`.
    added_query: String,
}

impl QueryEndpoint {
    /// The endpoint of these settings; `None` if there is none.
    ///
    /// # Errors
    /// [`EndpointError`]: better now than at a client's first connection.
    pub fn new(
        settings: &Endpoint,
        app_id: &str,
        shard_num: u32,
    ) -> Result<Option<QueryEndpoint>, EndpointError> {
        if settings.urls.is_empty() {
            return Ok(None);
        }
        let patterns =
            settings.urls.iter().map(|url| pattern(url)).collect::<Result<Vec<_>, _>>()?;
        let added_query = format!("schema={app_id}_{shard_num}&appID={app_id}");
        Ok(Some(QueryEndpoint { settings: settings.clone(), patterns, added_query }))
    }

    /// The URL of a request, with our parameters.
    ///
    /// # Errors
    /// The connection's own URL is not allowed, or unusable.
    pub(super) fn target(
        &self,
        credentials: &Credentials,
        verb: &str,
    ) -> Result<String, ApiFailure> {
        let internal = |text: String| ApiFailure::call(CallReason::Internal, text);
        let wanted = match &credentials.query_url {
            Some(url) => &**url,
            None => self.settings.urls.first().map(String::as_str).unwrap_or_default(),
        };
        let refused = || {
            internal(format!("URL \"{wanted}\" is not allowed by the ZERO_QUERY_URL configuration"))
        };
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
                "Failed to {verb} queries: The push URL cannot contain the reserved query param \
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
        for (name, value) in &credentials.query_headers {
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

fn pattern(text: &str) -> Result<UrlPattern, EndpointError> {
    let err = |cause: String| EndpointError::Pattern { pattern: text.to_owned(), cause };
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

    fn endpoint(urls: &[&str]) -> QueryEndpoint {
        let settings = Endpoint {
            urls: urls.iter().map(|u| (*u).to_owned()).collect(),
            api_key: Some(Secret::new("k")),
            forward_cookies: true,
            allowed_client_headers: vec!["x-app".into(), "authorization".into()],
            allowed_request_headers: vec!["x-trace".into()],
        };
        QueryEndpoint::new(&settings, "zero", 0).unwrap().unwrap()
    }

    fn with_url(url: &str) -> Credentials {
        Credentials { query_url: Some(url.into()), ..Credentials::default() }
    }

    #[test]
    fn the_first_url_is_the_default_and_gets_our_parameters() {
        let e = endpoint(&["https://app.example/q?a=1", "https://other.example/*"]);
        assert_eq!(
            e.target(&Credentials::default(), "transform").unwrap(),
            "https://app.example/q?a=1&schema=zero_0&appID=zero"
        );
    }

    #[test]
    fn other_urls_must_match_a_pattern() {
        let e = endpoint(&["https://app.example/q", "https://*.branch.example/:name/q"]);
        for ok in ["https://app.example/q", "https://x.branch.example/dev/q?page=2"] {
            assert!(e.target(&with_url(ok), "transform").is_ok(), "{ok}");
        }
        for bad in ["https://app.example/q2", "http://app.example/q", "https://evil.example/", "x"]
        {
            let failure = e.target(&with_url(bad), "transform").unwrap_err();
            assert_eq!(
                failure.message,
                format!("URL \"{bad}\" is not allowed by the ZERO_QUERY_URL configuration")
            );
        }
    }

    #[test]
    fn reserved_parameters_are_refused_before_any_request() {
        let e = endpoint(&["https://app.example/q"]);
        let failure = e.target(&with_url("https://app.example/q?schema=x"), "validate");
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
        let error = QueryEndpoint::new(&settings, "zero", 0).unwrap_err();
        assert!(error.to_string().contains("https://app.example/:("));
    }

    #[test]
    fn headers_are_filtered_and_ours_win() {
        let e = endpoint(&["https://app.example/q"]);
        let list = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
        };
        let credentials = Credentials {
            token: Some("tok".into()),
            query_headers: list(&[("X-App", "1"), ("X-Secret", "2"), ("Authorization", "no")]),
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
