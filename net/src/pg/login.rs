//! Logging in, without I/O: the server's messages go in, our answers come out.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::{backend, frontend};

use super::config::PgConfig;
use super::error::PgError;
use super::frame::{Frame, server_error};

/// Most parameters a server may report (it reports about fifteen).
const MAX_PARAMETERS: usize = 256;

/// What the session knows once it is logged in.
#[derive(Debug, Default)]
pub struct SessionInfo {
    /// `server_version`, `TimeZone`, ….
    pub parameters: BTreeMap<String, String>,
    /// For cancelling.
    pub process_id: i32,
    /// For cancelling.
    pub secret_key: i32,
}

/// The state of a log-in.
pub struct Login {
    user: String,
    password: Option<String>,
    /// `tls-server-end-point` data when the connection is TLS.
    binding: Option<Vec<u8>>,
    scram: Option<ScramSha256>,
    /// The server proved that it knows the password, or did not ask for SCRAM.
    scram_finished: bool,
    info: SessionInfo,
}

impl Login {
    /// Starts a log-in: the startup message is appended to `out`.
    ///
    /// # Errors
    /// [`PgError::Config`] if a setting contains a NUL.
    pub fn start(
        config: &PgConfig,
        replication: bool,
        binding: Option<Vec<u8>>,
        out: &mut BytesMut,
    ) -> Result<Login, PgError> {
        let fixed = [
            ("user", config.user.as_str()),
            ("database", config.database.as_str()),
            ("application_name", config.application_name.as_str()),
            ("client_encoding", "UTF8"),
        ];
        let parameters = fixed
            .into_iter()
            .chain(replication.then_some(("replication", "database")))
            .chain(config.parameters.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        frontend::startup_message(parameters, out)
            .map_err(|e| PgError::Config(format!("a setting cannot be sent: {e}")))?;
        Ok(Login {
            user: config.user.clone(),
            password: config.password.clone(),
            binding,
            scram: None,
            scram_finished: true,
            info: SessionInfo::default(),
        })
    }

    /// Takes one message of the server; `Some` when the session is ready.
    ///
    /// # Errors
    /// The server refused us, or asks for a method that we do not have.
    pub fn on_frame(
        &mut self,
        frame: Frame<'_>,
        out: &mut BytesMut,
    ) -> Result<Option<SessionInfo>, PgError> {
        if frame.tag == b'E' {
            return Err(PgError::Server(Box::new(server_error(frame.body))));
        }
        let Some(message) = parse(frame)? else { return Ok(None) };
        match message {
            backend::Message::AuthenticationOk => {
                if !self.scram_finished {
                    return Err(self.error("the server skipped the proof of its identity"));
                }
            }
            backend::Message::AuthenticationCleartextPassword => {
                let password = self.password()?.into_bytes();
                frontend::password_message(&password, out)?;
            }
            backend::Message::AuthenticationMd5Password(body) => {
                let hash = md5_hash(self.user.as_bytes(), self.password()?.as_bytes(), body.salt());
                frontend::password_message(hash.as_bytes(), out)?;
            }
            backend::Message::AuthenticationSasl(body) => self.start_scram(&body, out)?,
            backend::Message::AuthenticationSaslContinue(body) => {
                let user = self.user.clone();
                let scram = self.scram.as_mut().ok_or_else(unasked)?;
                scram
                    .update(body.data())
                    .map_err(|e| PgError::Auth { user, cause: e.to_string() })?;
                frontend::sasl_response(scram.message(), out)?;
            }
            backend::Message::AuthenticationSaslFinal(body) => {
                let user = self.user.clone();
                let scram = self.scram.as_mut().ok_or_else(unasked)?;
                scram
                    .finish(body.data())
                    .map_err(|e| PgError::Auth { user, cause: e.to_string() })?;
                self.scram_finished = true;
            }
            backend::Message::AuthenticationGss
            | backend::Message::AuthenticationSspi
            | backend::Message::AuthenticationKerberosV5
            | backend::Message::AuthenticationScmCredential => {
                return Err(self.error(
                    "the server asks for GSS, SSPI or another method that is not supported; \
                     allow scram-sha-256 for this role in pg_hba.conf",
                ));
            }
            backend::Message::ParameterStatus(body) => {
                if self.info.parameters.len() < MAX_PARAMETERS {
                    self.info.parameters.insert(body.name()?.to_owned(), body.value()?.to_owned());
                }
            }
            backend::Message::BackendKeyData(body) => {
                self.info.process_id = body.process_id();
                self.info.secret_key = body.secret_key();
            }
            backend::Message::ReadyForQuery(_) => {
                return Ok(Some(std::mem::take(&mut self.info)));
            }
            _ => {
                return Err(PgError::Protocol(format!(
                    "message {:?} during log-in",
                    char::from(frame.tag)
                )));
            }
        }
        Ok(None)
    }

    fn start_scram(
        &mut self,
        body: &backend::AuthenticationSaslBody,
        out: &mut BytesMut,
    ) -> Result<(), PgError> {
        let (mut plain, mut plus) = (false, false);
        let mut mechanisms = body.mechanisms();
        while let Some(mechanism) = mechanisms.next()? {
            plain |= mechanism == SCRAM_SHA_256;
            plus |= mechanism == SCRAM_SHA_256_PLUS;
        }
        let password = self.password()?;
        let (mechanism, binding) = match self.binding.take() {
            Some(hash) if plus => (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(hash)),
            _ if !plain => {
                return Err(self.error("the server offers no SASL mechanism that is supported"));
            }
            // We could bind, the server cannot: say so, that a man in the middle is noticed.
            Some(_) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        };
        let scram = ScramSha256::new(password.as_bytes(), binding);
        frontend::sasl_initial_response(mechanism, scram.message(), out)?;
        self.scram = Some(scram);
        self.scram_finished = false;
        Ok(())
    }

    fn password(&self) -> Result<String, PgError> {
        self.password.clone().ok_or_else(|| {
            self.error("the server asks for a password, and the connection string has none")
        })
    }

    fn error(&self, cause: &str) -> PgError {
        PgError::Auth { user: self.user.clone(), cause: cause.to_owned() }
    }
}

fn unasked() -> PgError {
    PgError::Protocol("a SASL message that was not asked for".into())
}

/// The message as `postgres-protocol` reads it; `None` for a notice and for other messages
/// that say nothing to us at this point.
fn parse(frame: Frame<'_>) -> Result<Option<backend::Message>, PgError> {
    if matches!(frame.tag, b'N' | b'A' | b'v') {
        return Ok(None);
    }
    let mut bytes = BytesMut::with_capacity(frame.body.len() + 5);
    bytes.extend_from_slice(&[frame.tag]);
    bytes.extend_from_slice(&(frame.body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(frame.body);
    backend::Message::parse(&mut bytes)
        .map_err(|e| PgError::Protocol(format!("message {:?}: {e}", char::from(frame.tag))))
}

/// `tls-server-end-point` (RFC 5929): the certificate's hash, by the hash function of its
/// signature. `None` where that is not defined (Ed25519, PSS).
pub fn tls_server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    use sha2::Digest;
    let body = der(&mut Bytes::copy_from_slice(certificate), 0x30)?;
    let mut body = body;
    der(&mut body, 0x30)?; // tbsCertificate
    let mut algorithm = der(&mut body, 0x30)?;
    let oid = der(&mut algorithm, 0x06)?;
    // sha*WithRSAEncryption 1.2.840.113549.1.1.x; ecdsa-with-SHA2 1.2.840.10045.4.3.x.
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03];
    let (&last, family) = oid.split_last()?;
    let bits = match (family, last) {
        // MD5 and SHA-1 signatures bind with SHA-256.
        (RSA, 4 | 5 | 11) | (ECDSA, 2) => 256,
        (RSA, 12) | (ECDSA, 3) => 384,
        (RSA, 13) | (ECDSA, 4) => 512,
        _ => return None,
    };
    Some(match bits {
        256 => sha2::Sha256::digest(certificate).to_vec(),
        384 => sha2::Sha384::digest(certificate).to_vec(),
        _ => sha2::Sha512::digest(certificate).to_vec(),
    })
}

/// Takes one DER element of the given tag off the front; returns its content.
fn der(bytes: &mut Bytes, tag: u8) -> Option<Bytes> {
    if *bytes.first()? != tag {
        return None;
    }
    let first = usize::from(*bytes.get(1)?);
    let (length, header) = if first < 0x80 {
        (first, 2)
    } else {
        let count = first & 0x7f;
        if count == 0 || count > 4 {
            return None;
        }
        let digits = bytes.get(2..2 + count)?;
        (digits.iter().fold(0usize, |n, b| n << 8 | usize::from(*b)), 2 + count)
    };
    let content = bytes.get(header..header.checked_add(length)?)?;
    let content = bytes.slice_ref(content);
    let _ = bytes.split_to(header + length);
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(password: Option<&str>) -> (Login, BytesMut) {
        let mut config = PgConfig::parse("postgres://u@h/d").unwrap();
        config.password = password.map(str::to_owned);
        let mut out = BytesMut::new();
        let login = Login::start(&config, true, None, &mut out).unwrap();
        (login, out)
    }

    fn auth(code: u32, rest: &[u8]) -> Vec<u8> {
        [&code.to_be_bytes(), rest].concat()
    }

    #[test]
    fn the_startup_message_asks_for_replication() {
        let (_, out) = login(None);
        let text = String::from_utf8_lossy(&out);
        assert!(text.contains("replication\0database\0"), "{text:?}");
        assert!(text.contains("user\0u\0database\0d\0"), "{text:?}");
    }

    #[test]
    fn md5_answers_as_postgres_computes_it() {
        let (mut login, mut out) = login(Some("secret"));
        out.clear();
        let body = auth(5, b"abcd");
        assert!(login.on_frame(Frame { tag: b'R', body: &body }, &mut out).unwrap().is_none());
        assert_eq!(&out[5..8], b"md5");
        assert_eq!(out.len(), 1 + 4 + 35 + 1);
    }

    #[test]
    fn a_server_that_skips_its_proof_is_refused() {
        let (mut login, mut out) = login(Some("secret"));
        let body = auth(10, b"SCRAM-SHA-256\0\0");
        login.on_frame(Frame { tag: b'R', body: &body }, &mut out).unwrap();
        let ok = auth(0, b"");
        let error = login.on_frame(Frame { tag: b'R', body: &ok }, &mut out).unwrap_err();
        assert!(matches!(error, PgError::Auth { .. }), "{error}");
    }

    #[test]
    fn a_missing_password_and_unknown_methods_say_what_to_do() {
        let (mut login, mut out) = login(None);
        let body = auth(3, b"");
        let error = login.on_frame(Frame { tag: b'R', body: &body }, &mut out).unwrap_err();
        assert!(error.to_string().contains("asks for a password"), "{error}");
        let body = auth(7, b"");
        let error = login.on_frame(Frame { tag: b'R', body: &body }, &mut out).unwrap_err();
        assert!(error.to_string().contains("scram-sha-256"), "{error}");
    }

    #[test]
    fn broken_certificates_have_no_binding() {
        for bytes in [&[][..], &[0x30], &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], &[0x30, 2, 0x30, 0]]
        {
            assert_eq!(tls_server_end_point(bytes), None);
        }
    }
}
