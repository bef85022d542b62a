//! The wire: one gRPC method, read into a question and answered.

use std::convert::Infallible;
use std::task::{Context, Poll};

use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use zeroize::Zeroizing;

use super::super::listener::Seat;
use super::server::BOUNDS;
use super::{Asked, Ca};
use crate::identity::ca::grpc::message::{
    CREATE_CERTIFICATE, IstioCertificateRequest, IstioCertificateResponse, impersonated,
};

/// A request with a CSR of ours has less than one kilobyte.
const MOST_BYTES: usize = 64 * 1024;

impl UnaryService<IstioCertificateRequest> for Ca {
    type Response = IstioCertificateResponse;
    type Future = BoxFuture<Response<IstioCertificateResponse>, Status>;

    fn call(&mut self, request: Request<IstioCertificateRequest>) -> Self::Future {
        let ca = self.clone();
        // It has said what it wants. As long as nothing of that was granted, it is given no more time than at first.
        let seat = request.extensions().get::<Seat>().cloned().unwrap_or_default();
        seat.keep();
        Box::pin(async move {
            let answer = ca.answer(asked(request)).await;
            match answer {
                Ok(_) => seat.earn(),
                Err(_) => seat.limit(BOUNDS.request),
            }
            let cert_chain = answer.map_err(|refusal| refusal.status())?;
            Ok(Response::new(IstioCertificateResponse { cert_chain }))
        })
    }
}

impl<B> Service<http::Request<B>> for Ca
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            if request.uri().path() != CREATE_CERTIFICATE {
                return Ok(Status::unimplemented(format!("only {CREATE_CERTIFICATE} is served")).into_http());
            }
            let codec = ProstCodec::<IstioCertificateResponse, IstioCertificateRequest>::default();
            Ok(Grpc::new(codec).max_decoding_message_size(MOST_BYTES).unary(this, request).await)
        })
    }
}

fn asked(request: Request<IstioCertificateRequest>) -> Asked {
    let authorization = request.metadata().get("authorization");
    let authorization =
        authorization.and_then(|value| value.to_str().ok()).map(|text| Zeroizing::new(text.to_owned()));
    let IstioCertificateRequest { csr, validity_duration, metadata } = request.into_inner();
    let identity = metadata.as_ref().and_then(impersonated).unwrap_or_default().to_owned();
    Asked { authorization, identity, csr, validity_seconds: validity_duration }
}
