"""The cohort trainer: many clients' adapters through one frozen backbone; and prediction with each client's own adapter."""
