//! TLS client configurations (rustls with the `ring` provider), for Postgres and for HTTPS.
//!
//! The provider is always named explicitly: a process that links two providers makes
//! `ClientConfig::builder()` panic, and a dependency may bring the second one any day.
//!
//! Trust = webpki-roots (compiled in) + the system's certificates + an optional CA file. Where the
//! mode does not verify, the handshake's signature is still checked (the peer must own the key of
//! the certificate it shows), only the chain and the name are not.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};

/// How a Postgres connection uses TLS (spec: replication §1.1, plus libpq's `verify-ca`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TlsMode {
    /// Never TLS.
    Disable,
    /// Try TLS without verification; plain text when the server refuses TLS.
    #[default]
    Prefer,
    /// TLS or failure; the certificate is not verified (`require`, `allow`, `no-verify`).
    Require,
    /// TLS; the chain must lead to a trusted root, the host name is not compared.
    VerifyCa,
    /// TLS; the chain must lead to a trusted root and the certificate must name the host.
    VerifyFull,
}

impl TlsMode {
    /// From the value of a URL's `ssl` or `sslmode` parameter; an unknown value verifies fully.
    pub fn from_url_value(value: &str) -> TlsMode {
        match value {
            "disable" | "false" => TlsMode::Disable,
            "prefer" => TlsMode::Prefer,
            "require" | "allow" | "no-verify" => TlsMode::Require,
            "verify-ca" => TlsMode::VerifyCa,
            _ => TlsMode::VerifyFull,
        }
    }

    /// Whether a server without TLS may be used.
    pub fn allows_plain(self) -> bool {
        matches!(self, TlsMode::Disable | TlsMode::Prefer)
    }
}

/// Why a TLS configuration could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The CA file cannot be read, or is not PEM.
    #[error(
        "CA file {} cannot be used: {cause}. Give a readable PEM file with at least one \
         certificate", path.display()
    )]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// The host name is neither a DNS name nor an IP address.
    #[error("{0:?} is not a valid TLS server name: give a DNS name or an IP address")]
    ServerName(String),
    /// rustls refused the configuration.
    #[error("TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
    /// The certificate verifier could not be built.
    #[error("TLS certificate verifier: {0}")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
}

/// The one crypto provider of the process.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

/// Makes `ring` the process-wide default, for dependencies that ask for the default one. Call it
/// first in `main`; further calls do nothing.
pub fn install_default_provider() {
    // An error means that a default is already set, which is what is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// The TLS client configuration for `mode`; `None` for [`TlsMode::Disable`].
///
/// `alpn` is offered as is (Postgres 17 wants `postgresql` for direct TLS; empty otherwise).
///
/// # Errors
/// The CA file is unreadable, or holds no certificate.
pub fn client_config(
    mode: TlsMode,
    ca_file: Option<&Path>,
    alpn: &[&[u8]],
) -> Result<Option<Arc<ClientConfig>>, TlsError> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let mut config = match mode {
        TlsMode::Disable => return Ok(None),
        TlsMode::Prefer | TlsMode::Require => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(NoVerification(provider())))
            .with_no_client_auth(),
        TlsMode::VerifyCa => {
            let inner =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots(ca_file)?), provider())
                    .build()?;
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(ChainOnly(inner)))
                .with_no_client_auth()
        }
        TlsMode::VerifyFull => {
            builder.with_root_certificates(roots(ca_file)?).with_no_client_auth()
        }
    };
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    Ok(Some(Arc::new(config)))
}

/// `host` as a name to verify (and to send as SNI, unless it is an IP address).
///
/// # Errors
/// It is neither a DNS name nor an IP address.
pub fn server_name(host: &str) -> Result<ServerName<'static>, TlsError> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::ServerName(host.to_owned()))
}

/// The trusted roots: compiled in, the system's, and those of `ca_file`. Certificates of the
/// system that do not parse are skipped; with `ca_file` an unusable file is an error.
///
/// # Errors
/// The CA file is unreadable, or holds no certificate.
pub fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = ca_file {
        let bad = |cause: String| TlsError::CaFile { path: path.to_owned(), cause };
        let mut added = 0;
        let certs = CertificateDer::pem_file_iter(path).map_err(|e| bad(e.to_string()))?;
        for cert in certs {
            store
                .add(cert.map_err(|e| bad(e.to_string()))?)
                .map_err(|e| bad(format!("certificate {}: {e}", added + 1)))?;
            added += 1;
        }
        if added == 0 {
            return Err(bad("it holds no certificate".to_owned()));
        }
    }
    Ok(store)
}

/// Accepts any certificate.
#[derive(Debug)]
struct NoVerification(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Verifies the chain, forgives the name.
#[derive(Debug)]
struct ChainOnly(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for ChainOnly {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The name is compared last, after the chain, the dates and the key usage.
        match self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
