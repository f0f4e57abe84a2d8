"""The cohort trainer: many clients' adapters through one frozen backbone; prediction with each client's own adapter."""
